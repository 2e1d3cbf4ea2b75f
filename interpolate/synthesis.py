"""Averages made of snapshots, and of other averages, when the training is over."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from interpolate._mixing import Progress
from interpolate._recipes import Path
from interpolate.errors import CheckpointError
from interpolate.files import mix_files
from interpolate.kernels import Kernel, parse_kernel
from interpolate.reports import Report
from interpolate.snapshots import kernel_from, snapshot_recipe, with_folders_opened
from interpolate.weights import whole

_TOO_FAR = 0.25


def average_snapshots(
    snapshots: Path | Sequence[Path],
    output: Path,
    *,
    kernel: Kernel | str = "uniform",
    last: int | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Write the average of a training's snapshots by a kernel; otherwise as `average_files`.

    What is not averaged (buffers, counters) is that of the latest snapshot. The report's recipe says by which kernel,
    and by how much the average misses it: nothing where plain snapshots are averaged, see `weights_by_kernel`.

    Args:
        snapshots: A folder of them, as `Snapshots` or another trainer writes, or several; or checkpoints, the oldest
            first.
        kernel: From `interpolate.kernels`, or its short name, such as `"power:0.1"`.
        last: How many of the latest snapshots; by default all.

    Example:
        >>> import os, tempfile, torch
        >>> from safetensors.torch import load_file
        >>> from interpolate import Snapshots
        >>> os.chdir(tempfile.mkdtemp())
        >>> model, snapshots = torch.nn.Linear(1, 1, bias=False), Snapshots("snapshots")
        >>> for step in (1, 2, 3):
        ...     _ = torch.nn.init.constant_(model.weight, step)
        ...     snapshots.update(model, step)
        >>> _ = average_snapshots("snapshots", "out.safetensors", last=2)
        >>> load_file("out.safetensors")
        {'weight': tensor([[2.5000]])}
    """
    paths, weights, recipe = plan_average(snapshots, kernel, last)
    recipe = {"operation": "average", "weights": weights, **recipe}
    return mix_files(paths, recipe, None if dry_run else output, progress)


def plan_average(
    snapshots: Path | Sequence[Path], kernel: Kernel | str, last: int | None
) -> tuple[list[str], list[float], dict[str, object]]:
    """Which snapshots, the latest first, with which weights; and what is to be said of it."""
    paths = latest_first(snapshots, last)
    made = parse_kernel(kernel) if isinstance(kernel, str) else kernel
    weights, distance = weights_by_kernel(paths[::-1], made)
    return paths, weights[::-1], {"kernel": str(kernel), "error": distance}


def latest_first(snapshots: Path | Sequence[Path], last: int | None = None) -> list[str]:
    """The paths of snapshots, so that names, dtypes and what is not averaged are those of the latest."""
    if last is not None:
        last = whole("last", last, at_least=1)
    paths = with_folders_opened([snapshots] if isinstance(snapshots, (str, os.PathLike)) else snapshots)
    if last is not None and last > len(paths):
        raise ValueError(f"last is {last}, and there are only {len(paths)} snapshots.")
    return paths[::-1][:last]


def weights_by_kernel(paths: Sequence[str], kernel: Kernel) -> tuple[list[float], float]:
    """How much each snapshot weighs in the average by a kernel, and how far from that average what they give is.

    Plain snapshots weigh what the kernel says, the oldest being the first. Averages that `Snapshots` wrote along a run
    are put together so that what they give is nearest to the kernel's average of the run up to the latest: by least
    squares on how much each snapshot of the run weighs, with a sum of 1, so that weights that stood still stay what
    they are. Such weights can be negative.

    Source: Karras et al. 2024 (arXiv 2312.02696), section 3 and algorithm 3. Departs from it in using the weights
    of the snapshots that were averaged, instead of integrals, and in the sum of 1.

    Returns:
        The weights, and the Euclidean distance of the two sets of weights of the run's snapshots, as a fraction of the
        kernel's: 0 for plain snapshots.

    Raises:
        CheckpointError: Some are averages and some are not.
        ValueError: The nearest is further away than a quarter.
    """
    recipes = [snapshot_recipe(path) for path in paths]
    averages = [recipe for recipe in recipes if recipe and recipe.get("kernel")]
    if not averages:
        return kernel.weights(len(paths)).tolist(), 0.0
    if len(averages) < len(paths):
        plain = paths[[recipe in averages for recipe in recipes].index(False)]
        raise CheckpointError(f"{plain} is no average by a kernel, and others are; give the ones or the others.")
    n = max(recipe["n_averaged"] for recipe in averages)
    known = [kernel_from(recipe["kernel"]).weights(recipe["n_averaged"]) for recipe in averages]
    columns = torch.stack([nn.functional.pad(weights, (0, n - len(weights))) for weights in known], 1)
    weights, distance = nearest(kernel.weights(n), columns)
    if distance > _TOO_FAR:
        raise ValueError(
            f"the nearest to {kernel} that {len(paths)} averages give is off by {distance:.2g} of it; at most "
            f"{_TOO_FAR} is taken for it. Add averages of other lengths or moments, or choose a kernel between them."
        )
    return weights, distance


def nearest(target: Tensor, columns: Tensor) -> tuple[list[float], float]:
    """The combination of columns, of sum 1, that is nearest to the target: its coefficients and relative distance.

    Example:
        >>> nearest(torch.tensor([0.5, 0.5]), torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        ([0.5, 0.5], 0.0)
    """
    last = columns[:, -1:]
    others = torch.linalg.lstsq(columns[:, :-1] - last, target[:, None] - last, driver="gelsd").solution[:, 0]
    coefficients = torch.cat([others, 1 - others.sum(0, keepdim=True)])
    distance = torch.linalg.vector_norm(columns @ coefficients - target) / torch.linalg.vector_norm(target)
    return coefficients.tolist(), distance.item()
