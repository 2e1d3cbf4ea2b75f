"""Open-VCLIP: an open-vocabulary video CLIP by interpolated weight optimization (Weng et al., ICML 2023)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from applications.openvclip.inference.classifier import Classifier

__all__ = ["Classifier"]


def __getattr__(name: str) -> Any:
    if name != "Classifier":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from applications.openvclip.inference.classifier import Classifier  # brings torch, for which --help must not wait

    return Classifier
