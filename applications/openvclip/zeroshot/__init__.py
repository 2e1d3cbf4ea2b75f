"""Zero-shot evaluation: one pass over the videos for all weights, and its report."""
