"""Patching and its kin: weights mixed from several sets of weights, name by name."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from interpolate._names import bare, by_bare_name, renamed, unwrapped
from interpolate._unmixable import check_mixable
from interpolate.checkpoints import Checkpoint
from interpolate.weights import Weights, check_coefficient, check_match, lerp, listed, mixing_precision

Source: TypeAlias = "Weights | nn.Module | str | os.PathLike[str]"
"""Where weights come from: a state dict, a module, or the path or URL of a checkpoint."""

Ratio: TypeAlias = "float | Mapping[str, float]"
"""One weight of the anchor for all, or one for each name pattern (as in `fnmatch`); the first that fits holds."""

Recipe: TypeAlias = "dict[str, Any]"
"""An operation by name and its arguments, as JSON can keep them: what a file's metadata says of how it was made."""

_BATCH_NORM_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")

EXTRA_STATE = "_extra_state"
"""Where a module's own state stands in a state dict, which may be a tensor, but no weight (`get_extra_state`)."""


def patch(anchor: Source, theta: Source, *, anchor_weight: Ratio) -> dict[str, Tensor]:
    """Interpolate two sets of weights: `anchor_weight * anchor + (1 - anchor_weight) * theta`.

    Floating-point weights are mixed; everything else (integer and complex tensors, the buffers of a module, BatchNorm
    statistics in a state dict) is theta's. BatchNorm statistics should be re-estimated for the mixed weights. Values
    that are equal in both are kept, so a causal mask of infinities stays what it is. See `patch_files` for checkpoints
    that are not to be held in memory.

    Source: Weng et al. 2023 (arXiv 2302.00624), eq. 6; Ilharco et al. 2022 (PAINT). WiSE-FT and PAINT count the
    coefficient the other way: their alpha is `1 - anchor_weight`.

    Args:
        anchor: The pretrained weights: a state dict, `regularizer.anchor`, a module, or a checkpoint's path.
        theta: The fine-tuned weights: likewise, for instance `averager.weights`. Names must be the anchor's.
        anchor_weight: Weight of the anchor, in [0, 1]; 0 returns theta, 1 the anchor, bit for bit. Or such a weight by
            name pattern, the first that fits: `{"visual.*": 0.3, "*": 0.5}`.

    Returns:
        New tensors in theta's dtype and on its device, under theta's names without those of wrappers (DDP,
        `torch.compile`); nothing is shared with the inputs. The anchor's names may differ by one prefix before all of
        them. A module's extra state is left out: `load_weights`, which puts the rest into a module, leaves its own.

    Raises:
        WeightMismatchError: Names or shapes differ; the message lists them.
        ValueError: `anchor_weight` is not in [0, 1], a pattern fits no name or a name no pattern, or a mixed weight is
            not finite.

    Example:
        >>> import torch
        >>> patch({"w": torch.ones(1)}, {"w": torch.zeros(1)}, anchor_weight=0.25)["w"]
        tensor([0.2500])
    """
    return mix([theta, anchor], {"operation": "patch", "anchor_weight": anchor_weight})


def slerp(anchor: Source, theta: Source, *, anchor_weight: float) -> dict[str, Tensor]:
    """Interpolate along the arc between each tensor of theta and the anchor's, instead of along the chord.

    `sin((1 - w) * angle) / sin(angle) * theta + sin(w * angle) / sin(angle) * anchor`, with the angle between both as
    vectors; along the chord where they are nearly parallel. Everything else is as in `patch`.

    Source: Shoemake 1985, tensor by tensor as is usual in model merging.

    Example:
        >>> import torch
        >>> slerp({"w": torch.tensor([0.0, 1.0])}, {"w": torch.tensor([1.0, 0.0])}, anchor_weight=0.5)["w"]
        tensor([0.7071, 0.7071])
    """
    return mix([theta, anchor], {"operation": "slerp", "anchor_weight": anchor_weight})


def uniform_soup(sources: Sequence[Source]) -> dict[str, Tensor]:
    """The mean of several sets of weights; what is not mixed is that of the first.

    Summed in float64 and rounded once, to the dtype of the first.

    Source: Wortsman et al. 2022 (arXiv 2203.05482), "Model soups".

    Example:
        >>> import torch
        >>> uniform_soup([{"w": torch.zeros(1)}, {"w": torch.ones(1)}])["w"]
        tensor([0.5000])
    """
    return mix(sources, {"operation": "average"})


def task_arithmetic(anchor: Source, thetas: Sequence[Source], scales: Sequence[float]) -> dict[str, Tensor]:
    """Add task vectors to the anchor: `anchor + sum(scale * (theta - anchor))`; a negative scale unlearns a task.

    Source: Ilharco et al. 2023 (arXiv 2212.04089), "Editing models with task arithmetic".

    Args:
        scales: One finite number for each theta.

    Example:
        >>> import torch
        >>> anchor, theta = {"w": torch.ones(1)}, {"w": torch.tensor([3.0])}
        >>> task_arithmetic(anchor, [theta], [-0.5])["w"]
        tensor([0.])
    """
    return mix([anchor, *thetas], {"operation": "task_arithmetic", "scales": list(scales)})


def mix(sources: Sequence[Source], recipe: Recipe) -> dict[str, Tensor]:
    """Carry out a recipe on whole tensors in memory. The first source gives names, dtypes and what is not mixed."""
    if not sources:
        raise ValueError("there is nothing to mix: no set of weights was given.")
    first, *others = map(_weights, sources)
    check_mixable(first, *others)
    _check_tensors(first, *others)
    sides = sides_of(recipe, len(sources))
    if not first:
        raise ValueError(f"there is nothing to mix: {sides[0]} holds no tensor.")
    kept = _buffer_names(sources[0])
    for i, other in enumerate(others):
        names = renamed(other, first)
        kept |= {names[name] for name in _buffer_names(sources[i + 1]) if name in names}
        others[i] = other = {names[name]: tensor for name, tensor in other.items()}
        check_match(first, other, sides=(sides[0], sides[i + 1]))
    weights = {name: tensor for name, tensor in first.items() if is_mixed(name, tensor.dtype) and name not in kept}
    operation = compiled(recipe, list(weights), len(sources))
    mixed = {}
    for name, tensor in first.items():
        if name in weights:
            mixed[name] = operation(name, [tensor, *(other[name] for other in others)])
        else:
            mixed[name] = tensor.detach().clone()
    return mixed


def sides_of(recipe: Recipe, n: int, paths: Sequence[str] = ()) -> list[str]:
    """What the user calls the n inputs of a recipe: what they are to it, and their paths if they have any."""
    if recipe["operation"] in ("patch", "slerp"):
        roles = ["theta", "anchor"]
    elif recipe["operation"] == "task_arithmetic":
        roles = ["anchor", *(f"theta {i}" for i in range(n - 1))]
    else:
        return list(paths) or [f"source {i}" for i in range(n)]
    return [f"{role} {path}" for role, path in zip(roles, paths, strict=True)] if paths else roles


def is_mixed(name: str, dtype: torch.dtype) -> bool:
    """Whether a tensor of a checkpoint takes part in mixing, as far as name and dtype tell."""
    return dtype.is_floating_point and name.rpartition(".")[2] not in (*_BATCH_NORM_BUFFERS, EXTRA_STATE)


def compiled(recipe: Recipe, names: Sequence[str], n_sources: int) -> Callable[[str, list[Tensor]], Tensor]:
    """A recipe as a function of a name and its tensors (of one shape), with all arguments checked.

    Raises:
        ValueError: The recipe is unknown, or an argument is out of its range.
    """
    kind = recipe["operation"]
    if kind == "patch":
        ratios = _ratios(recipe["anchor_weight"], names)
        operation = lambda name, tensors: lerp(tensors[0], tensors[1], ratios[name])  # noqa: E731 # one of four alike
    elif kind == "slerp":
        weight = recipe["anchor_weight"]
        check_coefficient("anchor_weight", weight)
        operation = lambda _, tensors: _slerp(tensors[0], tensors[1], weight)  # noqa: E731
    elif kind == "average":
        operation = lambda _, tensors: _mean(tensors)  # noqa: E731
    elif kind == "task_arithmetic":
        scales = recipe["scales"]
        if len(scales) != n_sources - 1 or not all(map(math.isfinite, scales)):
            raise ValueError(f"scales must be {n_sources - 1} finite numbers, one for each theta, got {scales}.")
        operation = lambda _, tensors: _sum_of_tasks(tensors, scales)  # noqa: E731
    else:
        raise ValueError(f"unknown operation {kind!r} in a recipe.")
    return lambda name, tensors: _checked(name, operation(name, tensors), tensors)


def _mean(tensors: list[Tensor]) -> Tensor:
    first = tensors[0].detach()
    total = first.to(torch.float64, copy=True)  # a running mean in float32 hardly moves after some thousand tensors
    for tensor in tensors[1:]:
        total += tensor.detach().to(first.device, mixing_precision(tensor.dtype))  # float8 is not promoted
    return (total / len(tensors)).to(first.dtype)


def _sum_of_tasks(tensors: list[Tensor], scales: Sequence[float]) -> Tensor:
    anchor = tensors[0].detach()
    total = wide = anchor.to(mixing_precision(anchor.dtype))
    for theta, scale in zip(tensors[1:], scales, strict=True):
        total = total + scale * (theta.detach().to(wide) - wide)
    return total.to(anchor.dtype, copy=True)


def _slerp(theta: Tensor, anchor: Tensor, anchor_weight: float) -> Tensor:
    a, b = theta.detach().double(), anchor.detach().to(theta.device).double()
    cosine = a.flatten().dot(b.flatten()) / (a.norm() * b.norm())
    angle = torch.acos(cosine.clamp(-1, 1))
    if anchor_weight in (0, 1) or not angle.sin() > 1e-6:  # nearly parallel, or a zero vector
        return lerp(theta, anchor, anchor_weight)
    mixed = ((1 - anchor_weight) * angle).sin() * a + (anchor_weight * angle).sin() * b
    return (mixed / angle.sin()).to(theta.dtype)


def _checked(name: str, mixed: Tensor, tensors: list[Tensor]) -> Tensor:
    """The mixed tensor, if it is finite; where all tensors are equal, infinite values are theirs and not nan."""
    wide = mixed.to(mixing_precision(mixed.dtype))  # float8 has no isfinite
    if wide.sum().isfinite():
        return mixed
    first = tensors[0].detach()
    equal = torch.stack([first == tensor.to(first) for tensor in tensors]).all(0)
    mixed = torch.where(equal, first, mixed)
    wrong = int((~(wide.isfinite() | equal)).sum())
    if wrong:
        raise ValueError(
            f"{name} has {wrong} values that are not finite after mixing; look for nan or inf in what is mixed."
        )
    return mixed


def _ratios(anchor_weight: Ratio, names: Sequence[str]) -> dict[str, float]:
    """The weight of the anchor for every name."""
    patterns = anchor_weight if isinstance(anchor_weight, Mapping) else {"*": anchor_weight}
    ratios: dict[str, float] = {}
    for pattern, weight in patterns.items():
        check_coefficient("anchor_weight" if pattern == "*" else f"anchor_weight of {pattern!r}", weight)
        fitting = [name for name in names if fnmatchcase(name, pattern)]
        if not fitting and pattern != "*":
            raise ValueError(
                f"the pattern {pattern!r} in anchor_weight fits none of {len(names)} weights, e.g. {listed(names)}."
            )
        if ratios.keys() >= {*fitting} and pattern != "*":  # that there is no rest does no harm
            raise ValueError(
                f"the pattern {pattern!r} in anchor_weight decides nothing: what it fits ({listed(fitting)}) is "
                "decided by patterns before it. The first that fits holds: put the narrower one first."
            )
        ratios = dict.fromkeys(fitting, weight) | ratios
    without = [name for name in names if name not in ratios]
    if without:
        raise ValueError(f"no pattern in anchor_weight fits {listed(without)}; end with '*' for all the rest.")
    return ratios


def _weights(source: Source) -> Weights:
    """By bare names, without what modules keep by `get_extra_state`, which is no weight."""
    if isinstance(source, (str, os.PathLike)):
        with Checkpoint(source) as checkpoint:
            weights = {name: checkpoint.tensor(name) for name in checkpoint.entries}
    elif isinstance(source, nn.Module):
        weights = by_bare_name(unwrapped(source).state_dict().items())
    else:
        weights = bare(source)
    return {name: tensor for name, tensor in weights.items() if not name.endswith(EXTRA_STATE)}


def _check_tensors(*sets: Weights) -> None:
    for name, value in (item for weights in sets for item in weights.items()):
        if not isinstance(value, Tensor):
            raise ValueError(f"{name!r} is {type(value).__name__}, not a tensor; give the weights alone, by name.")


def _buffer_names(source: Source) -> set[str]:
    if not isinstance(source, nn.Module):
        return set()
    return set(by_bare_name(unwrapped(source).named_buffers(remove_duplicate=False)))
