"""Fine-tune without forgetting: interpolated weight regularization, weight averaging and patching for PyTorch."""

from interpolate.averaging import EMAAverager, KernelAverager, LAWAAverager, SWAAverager, WeightAverager
from interpolate.batchnorm import reestimate_batchnorm
from interpolate.depth import by_depth
from interpolate.errors import CheckpointError, WeightMismatchError
from interpolate.files import average_files, patch_files
from interpolate.patching import patch, slerp, task_arithmetic, uniform_soup
from interpolate.path import evaluate_path, greedy_soup
from interpolate.pulling import pull
from interpolate.regularizer import InterpolatedWeightRegularizer
from interpolate.searching import choose, repair
from interpolate.snapshots import Snapshots, snapshot_paths
from interpolate.synthesis import average_snapshots
from interpolate.weights import applied, load_weights

__all__ = [
    "CheckpointError",
    "EMAAverager",
    "InterpolatedWeightRegularizer",
    "KernelAverager",
    "LAWAAverager",
    "SWAAverager",
    "Snapshots",
    "WeightAverager",
    "WeightMismatchError",
    "applied",
    "average_files",
    "average_snapshots",
    "by_depth",
    "choose",
    "evaluate_path",
    "greedy_soup",
    "load_weights",
    "patch",
    "patch_files",
    "pull",
    "reestimate_batchnorm",
    "repair",
    "slerp",
    "snapshot_paths",
    "task_arithmetic",
    "uniform_soup",
]


def __getattr__(name: str) -> str:
    if name == "__version__":
        from importlib.metadata import version

        return version("interpolate-weights")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
