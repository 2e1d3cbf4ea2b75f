"""Weights moved towards others for good, in place: in the midst of training, on shards too."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from interpolate._names import by_bare_name, renamed, unwrapped
from interpolate._operations import checked
from interpolate._sharding import like, local
from interpolate._theta_only import ThetaOnly
from interpolate._unmixable import check_mixable
from interpolate.patching import Source, weights_of
from interpolate.weights import Weights, check_coefficient, check_match, lerp, trainable_weights


def pull(model: nn.Module, toward: Source, *, weight: float, theta_only: Sequence[str] = ()) -> None:
    """Move a model's trainable weights towards others: `weight * toward + (1 - weight) * theta`, in place.

    Done every so many steps with the anchor, fine-tuning stays near it (sequential fine-tuning with averaging, SFA);
    with the weights of an average or of another run, it is a step of Lookahead and the like. Optimizers keep their
    state, and gradients stay. Under DDP and FSDP2 every rank calls it with the same weights; nothing is communicated.

    Source: Kleiman et al. 2025 (arXiv 2501.05559), "SFA".

    Args:
        model: Wrapped or sharded as it may be.
        toward: Such as `regularizer.anchor` or `averager.weights`: for every trainable floating-point parameter a
            tensor, whole or sharded. What else the model has (frozen parameters, buffers) may be there and is ignored.
        weight: Weight of `toward`, in [0, 1]; 0 changes nothing, 1 copies.
        theta_only: Patterns of parameters that stay the model's own, which `toward` need not have: `["head.*"]`.

    Raises:
        WeightMismatchError, ValueError: They can't be mixed, a result is not finite, or `weight` is out of its range.
            Nothing has been changed then.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.constant_(model.weight, 4.0)
        >>> pull(model, {"weight": torch.zeros(1, 1)}, weight=0.25)
        >>> model.weight.item()
        3.0
    """
    theta, weights = trainable_weights(model), weights_of(toward)
    parts = ThetaOnly(theta_only, theta)
    if parts.rows:
        raise ValueError(f"theta_only: rows are not pulled apart, got {list(theta_only)}; name the whole weights.")
    theta = parts.shared(theta)
    bare = unwrapped(model)
    own = {
        **by_bare_name(bare.named_parameters(remove_duplicate=False)),
        **by_bare_name(bare.named_buffers(remove_duplicate=False)),
    }
    names = renamed(weights, own)
    weights = {
        names[name]: tensor for name, tensor in weights.items() if names[name] in theta or names[name] not in own
    }
    pull_tensors(theta, weights, weight, sides=("the model", "toward"))
    torch.clear_autocast_cache()


@torch.no_grad()
def pull_tensors(targets: Weights, toward: Weights, weight: float, sides: tuple[str, str]) -> None:
    """Each target, or this rank's shard of it, becomes `weight * toward + (1 - weight) * target`."""
    weight = check_coefficient("weight", weight, of=sides[1])
    check_mixable(targets, toward)
    check_match(targets, toward, sides=sides)
    for name, target in targets.items():
        _pulled(name, target, toward[name], weight)  # whether all can be, before any is
    for name, target in targets.items():
        local(target).copy_(_pulled(name, target, toward[name], weight))


def _pulled(name: str, target: Tensor, toward: Tensor, weight: float) -> Tensor:
    shard = local(target)
    other = local(like(toward, target.detach().to(toward.dtype)))  # not rounded to the target's dtype before mixing
    return checked(name, lerp(shard, other, weight), [shard, other])
