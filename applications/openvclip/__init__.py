"""Open-VCLIP: an open-vocabulary video CLIP by interpolated weight optimization (Weng et al., ICML 2023)."""
