"""Fine-tune without forgetting: interpolated weight regularization, weight averaging and patching for PyTorch."""

from interpolate.averaging import EMAAverager, LAWAAverager, SWAAverager, WeightAverager
from interpolate.batchnorm import reestimate_batchnorm
from interpolate.patching import patch
from interpolate.regularizer import InterpolatedWeightRegularizer
from interpolate.weights import WeightMismatchError, applied

__all__ = [
    "EMAAverager",
    "InterpolatedWeightRegularizer",
    "LAWAAverager",
    "SWAAverager",
    "WeightAverager",
    "WeightMismatchError",
    "applied",
    "patch",
    "reestimate_batchnorm",
]
