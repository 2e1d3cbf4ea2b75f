"""Patching and its kin: weights mixed from several sets of weights, name by name."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from interpolate._names import bare, by_bare_name, renamed, unwrapped
from interpolate._operations import Ratio, Recipe, compiled, is_mixed, patch_recipe, sides_of, without_extra_state
from interpolate._theta_only import ThetaOnly
from interpolate._unmixable import check_mixable
from interpolate.checkpoints import Checkpoint, Entry
from interpolate.weights import Weights, check_match

T = TypeVar("T")

Source: TypeAlias = "Weights | nn.Module | str | os.PathLike[str] | Checkpoint"
"""Where weights come from: a state dict, a module, or a checkpoint, open or by its path or URL."""


def patch(
    anchor: Source,
    theta: Source,
    *,
    anchor_weight: Ratio,
    extrapolate: bool = False,
    theta_only: Sequence[str] = (),
) -> dict[str, Tensor]:
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
            name pattern, the first that fits: `{"visual.*": 0.3, "*": 0.5}`; `by_depth` makes them.
        extrapolate: Let `anchor_weight` be any finite number: below 0 is beyond theta, above 1 beyond the anchor.
        theta_only: Patterns of what is theta's own and not the anchor's, such as `"head.*"`, a new head: it stays what
            it is, whatever the anchor has of such names. `"embed.weight[32000:]"` are the rows from 32000 on, added to
            those that the anchor has.

    Returns:
        New tensors in theta's dtype and on its device, under theta's names without those of wrappers (DDP,
        `torch.compile`); nothing is shared with the inputs. The anchor's names may differ by one prefix before all of
        them. A module's extra state is left out: `load_weights`, which puts the rest into a module, leaves its own.

    Raises:
        WeightMismatchError: Names or shapes differ; the message lists them.
        ValueError: `anchor_weight` is out of its range, a pattern fits no name or a name no pattern, or a mixed weight
            is not finite.

    Example:
        >>> import torch
        >>> patch({"w": torch.ones(1)}, {"w": torch.zeros(1)}, anchor_weight=0.25)["w"]
        tensor([0.2500])
    """
    return mix([theta, anchor], patch_recipe(anchor_weight, extrapolate, theta_only))


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
    theta, *rest = map(weights_of, sources)
    parts = ThetaOnly(recipe.get("theta_only", ()), theta)
    completed = [
        {
            name: parts.completed(name, tensor, theta[name]) if name in parts.rows else tensor
            for name, tensor in some.items()
        }
        for some in (parts.paired(theta, weights) for weights in rest)
    ]
    first, *others = matched([parts.shared(theta), *completed], sides_of(recipe, len(sources)))
    kept = buffer_names(sources, parts)
    weights = {name: tensor for name, tensor in first.items() if is_mixed(name, tensor.dtype) and name not in kept}
    operation = compiled(recipe, list(weights), len(sources))
    mixed = {}
    for name, tensor in theta.items():
        if name in weights:
            mixed[name] = operation(name, [tensor, *(other[name] for other in others)])
        else:
            mixed[name] = tensor.detach().clone()
    return mixed


def weights_of(source: Source) -> Weights:
    """By bare names, without what modules keep by `get_extra_state`, which is no weight."""
    if isinstance(source, (str, os.PathLike)):
        with Checkpoint(source) as checkpoint:
            return weights_of(checkpoint)
    if isinstance(source, Checkpoint):
        weights = {name: source.tensor(name) for name in source.entries}
    elif isinstance(source, nn.Module):
        weights = by_bare_name(unwrapped(source).state_dict().items())
    else:
        weights = bare(source)
    return without_extra_state(weights)


def matched(sets: Sequence[Mapping[str, T]], sides: Sequence[str]) -> list[dict[str, T]]:
    """Sets of weights by the names of the first one, after all checks that need no values.

    Args:
        sets: Name → tensor, or what a checkpoint says of one.
        sides: What the user calls them.

    Raises:
        WeightMismatchError, ValueError: They can't be mixed.
    """
    first = dict(sets[0])
    if not first:
        raise ValueError(f"there is nothing to mix: {sides[0]} holds no tensor.")
    named = [first]
    for weights in sets[1:]:
        names = renamed(weights, first)
        named.append({names[name]: tensor for name, tensor in weights.items()})
    check_mixable(*named)
    for side, weights in zip(sides, named, strict=True):
        for name, tensor in weights.items():
            if not isinstance(tensor, (Tensor, Entry)):
                raise ValueError(
                    f"{name!r} of {side} is {type(tensor).__name__}, not a tensor; give the weights alone."
                )
            if isinstance(tensor, Tensor) and (tensor.is_meta or tensor.layout != torch.strided):
                kind = "meta, without values" if tensor.is_meta else f"{tensor.layout}".removeprefix("torch.")
                raise ValueError(f"{name!r} of {side} is a tensor of the kind {kind}; only dense ones can be mixed.")
        check_match(first, weights, sides=(sides[0], side))
    return named


def buffer_names(sources: Sequence[Source], parts: ThetaOnly) -> set[str]:
    """What is a buffer in one of those sources that are modules, by the names of the first source, as far as shared."""
    kept: set[str] = set()
    for source in sources:
        if isinstance(source, nn.Module):
            names = parts.names(weights_of(source))
            buffers = by_bare_name(unwrapped(source).named_buffers(remove_duplicate=False))
            kept |= {names[name] for name in buffers if name in names}
    return kept
