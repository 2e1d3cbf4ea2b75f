"""What to try on held-out data: kernels and weights of the anchor for a training, and ways to mend a tuned model."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from interpolate._mixing import Mixing
from interpolate._operations import Ratio, Recipe, compiled, is_mixed, patch_recipe
from interpolate._recipes import Path
from interpolate._theta_only import ThetaOnly
from interpolate.checkpoints import Checkpoint
from interpolate.choosing import Choice, Evaluate, Judging
from interpolate.depth import by_depth
from interpolate.kernels import parse_kernel
from interpolate.patching import patch, weights_of
from interpolate.synthesis import latest_first, weights_by_kernel
from interpolate.weights import Weights, check_coefficient, mixing_precision, whole

KERNELS = "uniform", "power:0.05", "power:0.1", "power:0.2"
ANCHOR_WEIGHTS = tuple(i / 10 for i in range(11))

_COARSE = (0.0, 0.25, 0.5, 0.75, 1.0)
_LARGEST = 4
"""How many groups of weights get a weight of the anchor of their own."""

Progress = Callable[[int, int], object]


def choose(
    snapshots: Path | Sequence[Path],
    evaluate: Evaluate,
    *,
    data: str,
    anchor: Path | None = None,
    kernels: Sequence[str] = KERNELS,
    anchor_weights: Sequence[float] = ANCHOR_WEIGHTS,
    last: int | None = None,
    theta_only: Sequence[str] = (),
    progress: Progress | None = None,
) -> Choice:
    """Choose how long to average over a training, and how much of the anchor to mix in, on held-out data in one go.

    Every snapshot is read once; in memory are one average for each kernel, the anchor, and the weights that are judged.

    Args:
        snapshots: As for `average_snapshots`, and so is `last`.
        evaluate: Called with name → tensor; gives a metric or several, see `interpolate.choosing`.
        data: Name of the data that `evaluate` uses; not those of a test.
        anchor: The pretrained checkpoint; None for averages alone.
        kernels: Their short names, see `interpolate.kernels.parse_kernel`.
        anchor_weights: In [0, 1].
        theta_only: As for `patch`, what the snapshots have and the anchor has not: it is averaged alone.

    Returns:
        All candidates, kernel by kernel; `Choice.write` writes the chosen one, which is a patched average.

    Raises:
        ValueError, WeightMismatchError, CheckpointError, OSError: As for `average_snapshots`, and where `data` is that
            of a test or `evaluate` gives no metric.

    Example:
        >>> import os, tempfile
        >>> from safetensors.torch import save_file
        >>> os.chdir(tempfile.mkdtemp())
        >>> for step in (1, 2, 3):
        ...     save_file({"w": torch.tensor([float(step)])}, f"step-{step}.safetensors")
        >>> save_file({"w": torch.zeros(1)}, "anchor.safetensors")
        >>> worth = lambda weights: -abs(weights["w"].item() - 1.6)
        >>> choose(".", worth, data="dev", anchor="anchor.safetensors", kernels=["uniform"]).chosen.settings
        {'kernel': 'uniform', 'anchor_weight': 0.2}
    """
    judging = Judging(evaluate, data)
    ratios = [check_coefficient("anchor_weights", weight) for weight in anchor_weights] if anchor is not None else [0.0]
    if not kernels or not ratios:
        raise ValueError("there is nothing to choose from: no kernel or no weight of the anchor was given.")
    paths = latest_first(snapshots, last)
    shares = {kernel: weights_by_kernel(paths[::-1], parse_kernel(kernel))[0][::-1] for kernel in kernels}
    inputs = paths if anchor is None else [*paths, os.fspath(anchor)]
    if theta_only and anchor is None:
        raise ValueError(f"theta_only is what the anchor does not have, got {theta_only} without an anchor.")
    means, pretrained, rest, parts = _averages(inputs, shares, anchor is not None, theta_only)
    for kernel, mean in means.items():
        for ratio in ratios:
            mixed = {**mean, **_mixed(mean, pretrained, ratio, parts)}
            weights = {n: mixed[n].to(t.dtype, copy=True) if n in mixed else t.clone() for n, t in rest.items()}
            recipe: Recipe = {"operation": "average", "weights": shares[kernel], "kernel": kernel}
            if anchor is not None:
                recipe |= patch_recipe(ratio, extrapolate=False, theta_only=theta_only) | {"operation": "average"}
            judging.judge({"kernel": kernel, "anchor_weight": ratio}, recipe, weights)
            if progress:
                progress(len(judging.judged), len(means) * len(ratios))
    return judging.choice(inputs)


def _averages(
    inputs: Sequence[str], shares: Mapping[str, list[float]], has_anchor: bool, theta_only: Sequence[str]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor], dict[str, Tensor], ThetaOnly]:
    """The average by every kernel, in float32 or better; what the anchor has of it; the latest snapshot's tensors, of
    which those that are averaged have no values; and what is only in the snapshots."""
    means: dict[str, dict[str, Tensor]] = {kernel: {} for kernel in shares}
    rest: dict[str, Tensor] = {}
    with ExitStack() as stack:
        checkpoints = [stack.enter_context(Checkpoint(path)) for path in inputs]
        recipe: Recipe = {"operation": "average"}
        if has_anchor:
            recipe |= {"anchor_weight": 0.0, "theta_only": theta_only}
        mixing = Mixing(checkpoints, recipe, [*inputs])
        snapshots = checkpoints[:-1] if has_anchor else checkpoints
        recipes = {kernel: {"operation": "average", "weights": weights} for kernel, weights in shares.items()}
        operations = {kernel: compiled(how, [], len(snapshots)) for kernel, how in recipes.items()}
        for name, entry in mixing.first.entries.items():
            if not is_mixed(name, entry.dtype):
                rest[name] = mixing.first.tensor(name)
                continue
            rest[name] = torch.empty(entry.shape, dtype=entry.dtype, device="meta")
            pieces: dict[str, list[Tensor]] = {kernel: [] for kernel in shares}
            for first, *others in zip(*(checkpoint.chunks(name) for checkpoint in snapshots), strict=True):
                wide = [first.to(mixing_precision(first.dtype)), *others]
                for kernel, operation in operations.items():
                    pieces[kernel].append(operation(name, wide))
            for kernel in shares:
                means[kernel][name] = torch.cat(pieces[kernel]).reshape(entry.shape)
        averaged = mixing.parts.shared(means[next(iter(shares))])
        anchor = {name: checkpoints[-1].tensor(name) for name in averaged} if has_anchor else {}
    return means, anchor, rest, mixing.parts


def _mixed(mean: Weights, anchor: Weights, ratio: float, parts: ThetaOnly) -> dict[str, Tensor]:
    operation = compiled({"operation": "patch", "anchor_weight": ratio}, [*anchor], 2)
    return {name: operation(name, [mean[name], parts.completed(name, anchor[name], mean[name])]) for name in anchor}


def repair(
    anchor: Path,
    theta: Path,
    evaluate: Evaluate,
    *,
    data: str,
    points: int = 11,
    theta_only: Sequence[str] = (),
    progress: Progress | None = None,
) -> Choice:
    """Find weights between a tuned model and its anchor that keep what was known and what was learnt.

    Tried are: one weight of the anchor for all (`patch`), from 0 to 1; weights that fall with depth (LiNeS, see
    `by_depth`), where the names show blocks; and, from the best single weight on, one group of weights after the other
    with a weight of its own (the four largest of those that the names begin with). Both sets of weights are held in
    memory, and read once.

    Args:
        anchor: The pretrained checkpoint.
        theta: The tuned one.
        evaluate: Called with name → tensor; gives `{"new": …, "kept": …}`, what was learnt and what was known before,
            on one scale. The highest mean of the two is chosen, as in PAINT.
        data: Name of the data that `evaluate` uses; not those of a test.
        points: How many weights of the anchor for all, at least 2.
        theta_only: As for `patch`.

    Returns:
        All candidates in the order of their trial; `Choice.write` writes the chosen one, as `patch_files` does.

    Raises:
        ValueError, WeightMismatchError, CheckpointError, OSError: As for `patch`, and where `data` is that of a test or
            `evaluate` does not give both metrics.

    Example:
        >>> import os, tempfile
        >>> from safetensors.torch import save_file
        >>> os.chdir(tempfile.mkdtemp())
        >>> save_file({"head": torch.zeros(1), "body": torch.zeros(1)}, "anchor.safetensors")
        >>> save_file({"head": torch.ones(1), "body": torch.ones(1)}, "theta.safetensors")
        >>> worth = lambda weights: {"new": weights["head"].item(), "kept": -weights["body"].item()}
        >>> repair("anchor.safetensors", "theta.safetensors", worth, data="dev").chosen.settings
        {'how': 'by group', 'anchor_weight': {'body': 1.0, 'head': 0.0, '*': 0.0}}
    """
    points = whole("points", points, at_least=2)
    judging, notes = Judging(evaluate, data, ("new", "kept")), []
    before, after = weights_of(anchor), weights_of(theta)
    own = ThetaOnly(theta_only, after).own
    names = {n: tensor.numel() for n, tensor in after.items() if is_mixed(n, tensor.dtype) and n not in own}

    def value_of(how: str, ratio: Ratio) -> float:
        recipe = patch_recipe(ratio, extrapolate=False, theta_only=theta_only)
        weights = patch(before, after, anchor_weight=ratio, theta_only=theta_only)
        value = judging.judge({"how": how, "anchor_weight": ratio}, recipe, weights)
        if progress:
            progress(len(judging.judged), max(len(judging.judged), points + 10 + _LARGEST * len(_COARSE)))
        return value

    values = {ratio: value_of("patch", ratio) for ratio in (i / (points - 1) for i in range(points))}
    try:
        falling = [by_depth(names, first=a, last=b) for a in _COARSE for b in _COARSE if a > b]
    except ValueError as error:  # names without blocks are no mistake of the user's
        falling = []
        notes.append(f"not tried by depth: {error}")
    for ratios in falling:
        value_of("by depth", ratios)
    groups = [*_groups(names)]
    if len(groups) > 1:
        best = max(values, key=lambda ratio: (values[ratio] == values[ratio], values[ratio]))
        ratios, reached = {**dict.fromkeys(groups, best), "*": best}, values[best]
        for group in groups:
            for ratio in _COARSE:
                if ratio != best and (value := value_of("by group", tried := {**ratios, group: ratio})) > reached:
                    ratios, reached = tried, value
    else:
        notes.append("not tried by group: all names begin alike.")
    return judging.choice([os.fspath(theta), os.fspath(anchor)], notes)


def _groups(names: Mapping[str, int]) -> Iterator[str]:
    """Patterns of the largest groups of names that differ in the first part that is not the same in all."""
    split = [name.split(".") for name in names]
    depth = 0
    while all(len(parts) > depth + 1 for parts in split) and len({parts[depth] for parts in split}) == 1:
        depth += 1
    sizes: dict[str, int] = {}
    for parts, size in zip(split, names.values(), strict=True):
        pattern = re.sub(r"([*?[])", r"[\1]", ".".join(parts[: depth + 1])) + (".*" if len(parts) > depth + 1 else "")
        sizes[pattern] = sizes.get(pattern, 0) + size
    yield from sorted(sizes, key=lambda pattern: -sizes[pattern])[:_LARGEST]
