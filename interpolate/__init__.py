"""Fine-tune without forgetting: interpolated weight regularization, weight averaging and patching for PyTorch."""

from interpolate.averaging import SWAAverager
from interpolate.patching import patch
from interpolate.regularizer import InterpolatedWeightRegularizer
from interpolate.weights import WeightMismatchError, applied

__all__ = ["InterpolatedWeightRegularizer", "SWAAverager", "WeightMismatchError", "applied", "patch"]
