"""Which weights take part in mixing, how two sets of them are matched, mixed and put into a module for a while."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from interpolate._names import by_bare_name, unwrapped
from interpolate._sharding import like, local, reshard
from interpolate.errors import WeightMismatchError

Weights = Mapping[str, Tensor]
"""Named tensors, as `state_dict()` and `named_parameters()` give them."""

_LISTED = 3
_WHOLE = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def trainable_weights(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that take part in mixing: floating point, requiring gradients; tied ones once, by first name.

    Names are those of the bare module, whatever wraps it; weights sharded by FSDP2 are its shards.
    """
    reshard(module)
    parameters = by_bare_name(unwrapped(module).named_parameters())
    return {name: p for name, p in parameters.items() if p.requires_grad and p.is_floating_point()}


def check_match(
    theta: Mapping[str, Any], anchor: Mapping[str, Any], *, sides: tuple[str, str] = ("theta", "anchor")
) -> None:
    """Raise `WeightMismatchError` unless both hold the same names, with things of the same `shape`.

    Args:
        theta: Name → tensor, or anything else that has a shape.
        anchor: The same; it is what the message says is missing or unexpected.
        sides: What the user calls the two.
    """
    missing = [name for name in theta if name not in anchor]
    unexpected = [name for name in anchor if name not in theta]
    reshaped = [
        f"{name}: {sides[0]} {tuple(tensor.shape)}, {sides[1]} {tuple(anchor[name].shape)}"
        for name, tensor in theta.items()
        if name in anchor and tensor.shape != anchor[name].shape
    ]
    problems = [
        f"{len(names)} of {total} weights {what} ({listed(names)})"
        for names, total, what in (
            (missing, len(theta), "missing"),
            (unexpected, len(anchor), "unexpected"),
            (reshaped, len(theta), "of another shape"),
        )
        if names
    ]
    if problems:
        raise WeightMismatchError(
            f"{sides[1]} does not match {sides[0]}: {', '.join(problems)}. Both must come from the same architecture."
        )


def check_there(weights: Weights) -> None:
    """Raise `ValueError` for weights of a module that is yet to be filled."""
    empty = [name for name, tensor in weights.items() if tensor.is_meta]
    if empty:
        raise ValueError(
            f"{len(empty)} weights ({listed(empty)}) are on the meta device, without values. First fill the module: "
            "module.to_empty(device=…), then its weights."
        )


def whole(name: str, value: Any, at_least: int | None = None) -> int:
    """A count as Python's int; `ValueError` unless it is a whole number, which 700.0 is not, and large enough."""
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be a whole number, got {value!r}.") from None
    if at_least is not None and number < at_least:
        raise ValueError(f"{name} must be at least {at_least}, got {number}.")
    return number


def check_coefficient(name: str, value: Any, *, extrapolate: bool = False, of: str = "the anchor") -> float:
    """The weight of the anchor as Python's number; `ValueError` unless it is in [0, 1], which nan is not.

    Args:
        extrapolate: Let it be any number that float32 has.
        of: What it weighs.
    """
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not (abs(number) <= torch.finfo(torch.float32).max if extrapolate else 0 <= number <= 1):
        allowed = "finite, in float32 too" if extrapolate else "in [0, 1]"
        raise ValueError(f"{name} is the weight of {of} and must be {allowed}, got {value!r}.")
    return number


def lerp(theta: Tensor, anchor: Tensor, anchor_weight: float) -> Tensor:
    """`anchor_weight * anchor + (1 - anchor_weight) * theta`, a new tensor in theta's dtype and on its device.

    0 gives theta and 1 the anchor bit for bit. Half precision and float8 are mixed in float32 and rounded once.
    """
    theta, anchor = theta.detach(), anchor.detach().to(theta.device)
    if anchor_weight == 0:
        return theta.clone()
    if anchor_weight == 1:
        return anchor.to(theta.dtype, copy=True)
    precision = mixing_precision(theta.dtype)
    return torch.lerp(theta.to(precision), anchor.to(precision), anchor_weight).to(theta.dtype)


def mixing_precision(dtype: torch.dtype) -> torch.dtype:
    """What floating-point weights are mixed in: float32, of which half precision and float8 are parts, or float64."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def persistent_buffers(module: nn.Module) -> dict[str, Tensor]:
    """The buffers that belong to a module's state; others (`persistent=False`) are caches that forward passes remake.

    Names are those of the bare module, whatever wraps it.
    """
    return {
        name: slot.tensor
        for name, slot in _buffers(module, remove_duplicate=True).items()
        if slot.key not in slot.owner._non_persistent_buffers_set
    }


class _Slot(NamedTuple):
    owner: nn.Module
    key: str
    tensor: Tensor

    def register(self, tensor: Tensor) -> None:
        self.owner._buffers[self.key] = tensor


def _buffers(module: nn.Module, *, remove_duplicate: bool) -> dict[str, _Slot]:
    """Buffers by name, each with where it is registered."""
    return by_bare_name(
        (f"{path}.{key}" if path else key, _Slot(owner, key, buffer))
        for path, owner in unwrapped(module).named_modules(remove_duplicate=remove_duplicate)
        for key, buffer in owner._buffers.items()
        if buffer is not None
    )


@contextmanager
def applied(module: nn.Module, weights: Weights) -> Iterator[nn.Module]:
    """Put other weights into a module for the length of a `with` block; its own come back whatever happens.

    Args:
        module: Any module, wrapped in DDP or sharded by FSDP2 as it may be. Its parameters are overwritten in place
            and restored at the end, so optimizers and other holders of them are undisturbed. Do not train inside the
            block: what is learnt there is lost.
        weights: Name → tensor, for some or all of the parameters and buffers, without wrappers' prefixes.

    Yields:
        The module itself.

    Raises:
        WeightMismatchError: A name is not one of the module's, or a shape differs; nothing has been changed then.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> with applied(model, {"weight": torch.tensor([[2.0]])}):
        ...     model(torch.tensor([3.0])).item()
        6.0
    """
    targets = _targets(module, weights)
    check_match(targets, weights, sides=("the module", "what to apply"))
    _check_tied(targets, weights)
    with put(module, weights):
        yield module


@contextmanager
def put(module: nn.Module, weights: Weights) -> Iterator[nn.Module]:
    """`applied`, with buffers of other shapes allowed: an average has those of its last snapshot, and some grow."""
    targets = _targets(module, weights)
    slots = {name: slot for name, slot in _buffers(module, remove_duplicate=False).items() if name in weights}
    check_match(
        {name: target for name, target in targets.items() if name not in slots},
        {name: tensor for name, tensor in weights.items() if name not in slots},
    )
    backup = {name: target.detach().clone() for name, target in targets.items() if _can_hold(target, weights[name])}
    try:
        _overwrite(targets, slots, weights)
        reshard(module)
        yield module
    finally:
        for name, slot in slots.items():
            slot.register(targets[name])  # a forward pass may have registered another
        _overwrite({name: targets[name] for name in backup}, {}, backup)
        reshard(module)


def load_weights(module: nn.Module, weights: Weights) -> None:
    """Put weights into a module for good: `load_state_dict` for some of the weights, without its silence.

    `load_state_dict(weights, strict=False)` ignores names that it does not know, for instance all of them in a module
    that is wrapped by DDP or `torch.compile`; here they are an error.

    Args:
        module: Any module, wrapped or sharded as it may be.
        weights: Name → tensor, for some or all of the parameters and buffers, without wrappers' prefixes.

    Raises:
        WeightMismatchError: A name is not one of the module's, or a shape differs; nothing has been changed then.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(1, 1)
        >>> load_weights(model, {"weight": torch.tensor([[2.0]])})
        >>> model.weight.item()
        2.0
    """
    targets = _targets(module, weights)
    check_match(targets, weights, sides=("the module", "what to load"))
    _check_tied(targets, weights)
    _overwrite(targets, _buffers(module, remove_duplicate=False), weights)
    reshard(module)


def _targets(module: nn.Module, weights: Weights) -> dict[str, Tensor]:
    """The module's own tensors of the names in `weights`."""
    reshard(module)
    model = unwrapped(module)
    own: dict[str, Tensor] = {
        **by_bare_name(model.named_parameters(remove_duplicate=False)),
        **by_bare_name(model.named_buffers(remove_duplicate=False)),
    }
    unknown = [name for name in weights if name not in own]
    if unknown:
        raise WeightMismatchError(f"{len(unknown)} weights ({listed(unknown)}) are not in {type(model).__name__}.")
    check_there({name: own[name] for name in weights})
    cut = [n for n in weights if weights[n].is_floating_point() and own[n].dtype in _WHOLE]
    if cut:
        raise WeightMismatchError(
            f"{len(cut)} weights ({listed(f'{n}: {weights[n].dtype}' for n in cut)}) are floating point, and the "
            "module's are whole numbers: they would be cut off."
        )
    coded = [n for n in weights if own[n].is_floating_point() and not weights[n].is_floating_point()]
    if coded:
        raise WeightMismatchError(
            f"{len(coded)} weights ({listed(f'{n}: {weights[n].dtype}' for n in coded)}) are not floating point, and "
            "the module's are: quantised codes are no weights. Dequantise them first."
        )
    return {name: own[name] for name in weights}


def _check_tied(targets: Weights, values: Weights) -> None:
    """Raise `WeightMismatchError` where names are one tensor of the module, and their values differ."""
    first: dict[int, str] = {}
    for name, target in targets.items():
        other = first.setdefault(id(target), name)
        if other != name and values[other] is not values[name] and not _equal(values[other], values[name]):
            raise WeightMismatchError(
                f"{other} and {name} are one weight of the module, tied, and what is to be put there differs; give "
                "them one value, for instance one anchor_weight."
            )


def _equal(a: Tensor, b: Tensor) -> bool:
    return torch.equal(local(a), local(like(b, a)))


def _can_hold(target: Tensor, value: Tensor) -> bool:
    """Whether a value can be copied into a tensor: of one shape, every element in memory of its own (not expanded)."""
    expanded = any(size > 1 and not stride for size, stride in zip(target.shape, target.stride(), strict=True))
    return target.shape == value.shape and not expanded


@torch.no_grad()
def _overwrite(targets: Weights, slots: Mapping[str, _Slot], values: Weights) -> None:
    """Copy the values into the targets; a buffer that can't hold its value gives way to a new one."""
    for name, target in targets.items():
        value = like(values[name], target)
        if name in slots and not _can_hold(target, value):
            slots[name].register(value.clone())
        else:
            local(target).copy_(local(value))
    torch.clear_autocast_cache()  # or an enclosing autocast would go on with casts of the old values


def listed(names: Iterable[str]) -> str:
    names = list(names)
    rest = f", and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + rest
