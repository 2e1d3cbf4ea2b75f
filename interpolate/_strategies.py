"""Ways to run a function of a model at other weights that leave the model as it was, whatever happens.

Two at interpolated weights, the backward pass included: both add the gradients there, unscaled, to the `.grad` of the
model's own parameters. And one at any weights, without gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.utils._pytree import tree_leaves

from interpolate._isolation import isolated
from interpolate._sharding import inner, is_sharded, like, local, reshard
from interpolate.errors import WeightMismatchError
from interpolate.weights import Weights, check_match, listed, persistent_buffers, trainable_weights

T = TypeVar("T")
Parameters = Mapping[str, nn.Parameter]


def functional(
    model: nn.Module, theta: Parameters, anchor: Weights, alpha: float, function: Callable[[nn.Module], T]
) -> T:
    """Through `torch.func.functional_call`, with leaves of its own: the model's own weights are never touched.

    The leaves share `.grad` with the parameters, so DDP's hooks don't see this pass, and backward adds to the
    gradients that the plain pass goes on with: no second set is allocated.
    """
    leaves = dict(zip(theta, _lerp([*theta.values()], [anchor[name] for name in theta], alpha), strict=True))
    for name, leaf in leaves.items():
        leaf.requires_grad_().grad, theta[name].grad = theta[name].grad, None
    try:
        result = call_at(model, {id(p): leaves[name] for name, p in theta.items()}, function)
        leaked = [name for name, p in theta.items() if p.grad is not None]
    finally:
        for name, leaf in leaves.items():
            theta[name].grad = leaf.grad
    if leaked:
        raise RuntimeError(
            f"the loss went around the interpolated weights: {len(leaked)} of the model's own weights "
            f"({listed(leaked)}) got gradients. Compute it with the model that loss_fn is given and no other "
            "reference to it; if the model itself keeps such a reference, use strategy='in_place'."
        )
    return result


def in_place(
    model: nn.Module, theta: Parameters, anchor: Weights, alpha: float, function: Callable[[nn.Module], T]
) -> T:
    """In the live parameters, shard by shard: they hold the interpolated weights until the function has returned."""
    others = [p for p in model.parameters() if p.requires_grad and not p.is_floating_point()]
    gradients = [p.grad for p in others]
    own = {id(p): p for p in theta.values()}
    with isolated(inner(model), own), _restored(lambda: [local(p) for p in theta.values()]) as weights:
        try:
            for p in others:
                p.grad = None
            _lerp_(weights, [local(anchor[name]) for name in theta], alpha)
            _forget_copies(model)
            return function(model)
        finally:
            _forget_copies(model)
            for p, gradient in zip(others, gradients, strict=True):
                p.grad = gradient


STRATEGIES = {"functional": functional, "in_place": in_place}


def without_gradient(model: nn.Module, weights: Weights, buffers: Weights, function: Callable[[nn.Module], T]) -> T:
    """At weights for all that is trainable, and buffers in place of the model's own of these names.

    Nothing of the model is touched, or, where weights are sharded, it is swapped and restored bit for bit and unseen by
    autograd: a graph that is waiting for its backward pass takes no notice.
    """
    _check_wrappers(model)
    if scripted := _scripted(model):
        raise RuntimeError(
            f"TorchScript ({scripted}) keeps its weights and buffers out of reach of a pass at other weights. Use "
            "`with interpolate.applied(model, weights):` before the forward pass that is trained."
        )
    theta, own = trainable_weights(model), persistent_buffers(model)
    check_match(theta, weights, sides=("the model", "the set of weights to run it at"))
    unknown = [name for name in buffers if name not in own]
    if unknown:
        raise WeightMismatchError(f"{len(unknown)} buffers ({listed(unknown)}) are not in {type(model).__name__}.")
    stand_ins: dict[int, Tensor] = {id(own[name]): like(b, own[name]).clone() for name, b in buffers.items()}
    with torch.no_grad():
        values = {id(p): like(weights[name], p) for name, p in theta.items()}
        if not any(map(is_sharded, theta.values())):
            # They require gradients as parameters do: torch chooses kernels by it, and others can take twice as long.
            # Autocast then keeps casts of them, as of parameters.
            leaves = {own: value.detach().requires_grad_() for own, value in values.items()}
            try:
                return call_at(inner(model), stand_ins | leaves, function)
            finally:
                torch.clear_autocast_cache()
        stand_ins |= {id(p): p for p in theta.values()}
        # .data is without the counter by which autograd sees changes
        with isolated(inner(model), stand_ins), _restored(lambda: [local(p).data for p in theta.values()]) as shards:
            try:
                torch._foreach_copy_(shards, [local(value) for value in values.values()])
                _forget_copies(model)
                return function(inner(model))
            finally:
                _forget_copies(model)


def call_at(model: nn.Module, stand_ins: dict[int, Tensor], function: Callable[[nn.Module], T]) -> T:
    """A function of the model by `functional_call`, with stand-ins for tensors by id and copies of all its state."""
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in stand_ins]
    stand_ins = stand_ins | {id(p): p.detach().clone() for p in others}
    with isolated(model, stand_ins):
        parameters = {f"model.{name}": stand_ins.get(id(p), p) for name, p in model.named_parameters()}
        buffers = {f"model.{name}": buffer for name, buffer in model.named_buffers()}
        return functional_call(_Bound(model), (parameters, buffers), (function,), strict=True)


class _Bound(nn.Module):
    """Lets `functional_call` put weights under any function of a model, and not under its forward pass alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[[nn.Module], T]) -> T:
        return function(self.model)


@torch.no_grad()
def _lerp(theta: list[nn.Parameter], anchor: list[Tensor], alpha: float) -> Sequence[Tensor]:
    if _together(theta, anchor):
        return torch._foreach_lerp([*theta], anchor, alpha)
    return [torch.lerp(p, a.to(p.device), alpha) for p, a in zip(theta, anchor, strict=True)]


@torch.no_grad()
def _lerp_(weights: list[Tensor], anchor: list[Tensor], alpha: float) -> None:
    if _together(weights, anchor):
        torch._foreach_lerp_(weights, anchor, alpha)
        return
    for weight, a in zip(weights, anchor, strict=True):
        weight.lerp_(a.to(weight.device), alpha)


def _together(theta: Sequence[Tensor], anchor: Sequence[Tensor]) -> bool:
    """Whether the anchor is where the weights are; else it passes by, a weight of it at a time."""
    return all(a.device == p.device for p, a in zip(theta, anchor, strict=True))


@contextmanager
def _restored(shards: Callable[[], list[Tensor]]) -> Iterator[list[Tensor]]:
    """Tensors that come out as they went in. They are asked for again at the end: in the first pass of all, FSDP2 moves
    shards that it has to pad or to pin to memory of its own."""
    tensors = shards()
    backup = [tensor.clone() for tensor in tensors]
    try:
        yield tensors
    finally:
        with torch.no_grad():
            torch._foreach_copy_(shards(), backup)


def _forget_copies(model: nn.Module) -> None:
    """Drop what was made of weights that have since been changed in place: autocast's casts, FSDP2's gathered ones."""
    torch.clear_autocast_cache()
    reshard(model)


def choose_strategy(model: nn.Module, theta: Parameters, wanted: str | None, *, through_wrapper: bool) -> str:
    """The strategy to use, `functional` where it is right; `ValueError` where the wanted one or both would be wrong.

    Args:
        model: The model as the user calls it, wrappers included.
        theta: Its trainable weights.
        wanted: The user's choice, None for none.
        through_wrapper: Whether the pass at the interpolated weights is to go through DDP's wrapper.
    """
    if wanted is not None and wanted not in STRATEGIES:
        raise ValueError(f"strategy must be one of {', '.join(map(repr, STRATEGIES))} or None, got {wanted!r}.")
    _check_wrappers(model)
    distributed = inner(model) is not model
    obstacle = _obstacle_to_functional(model, theta)
    if obstacle is None and distributed and through_wrapper:
        obstacle = "DDP synchronises the gradients of its own parameters only"
    if wanted == "functional" and obstacle is not None:
        raise ValueError(f"strategy='functional' would be wrong: {obstacle}. Use strategy='in_place'.")
    strategy = wanted or ("functional" if obstacle is None else "in_place")
    if strategy == "in_place":
        if hooked := _hooked(theta, "_post_accumulate_grad_hooks"):
            raise ValueError(
                f"strategy='in_place' would run the post-accumulate-grad hooks of {listed(hooked)} while the model "
                f"holds the interpolated weights ({obstacle or 'as asked'}). Step the optimizer after backward instead."
            )
        if distributed and not through_wrapper and getattr(model, "_orig_mod", model).static_graph:
            raise ValueError(
                "strategy='in_place' under DDP with static_graph=True would leave gradients unsynchronised "
                f"({obstacle or 'as asked'}). Set static_graph=False."
            )
    return strategy


def check_hooks(theta: Parameters, strategy: str) -> None:
    """Raise `RuntimeError` where a strategy is wrong for hooks that parameters have got since it was chosen."""
    for attribute, wrong, kind in (
        ("_backward_hooks", "functional", "gradient hooks, which would not see gradients at the interpolated weights"),
        ("_post_accumulate_grad_hooks", "in_place", "post-accumulate-grad hooks, which would see interpolated weights"),
    ):
        if strategy == wrong and (hooked := _hooked(theta, attribute)):
            raise RuntimeError(f"{listed(hooked)}: {kind}. Register them before the regularizer is made.")


def _hooked(theta: Parameters, attribute: str) -> list[str]:
    return [name for name, p in theta.items() if getattr(p, attribute, None)]


def _check_wrappers(model: nn.Module) -> None:
    top = getattr(model, "_orig_mod", model)
    for name, module in model.named_modules():
        if isinstance(module, DataParallel) or type(module).__name__ == "FullyShardedDataParallel":
            raise ValueError(
                f"{type(module).__name__} is not supported. Use DistributedDataParallel, or "
                "torch.distributed.fsdp.fully_shard for sharded weights."
            )
        if isinstance(module, DistributedDataParallel) and module is not top:
            raise ValueError(f"{name!r} is wrapped in DistributedDataParallel; wrap the whole model instead.")


def _obstacle_to_functional(model: nn.Module, theta: Parameters) -> str | None:
    """Why `functional_call` would be silently wrong for this model, or None."""
    sharded = [name for name, p in theta.items() if is_sharded(p)]
    if sharded:
        return f"torch.func.functional_call ignores the weights given for sharded parameters ({listed(sharded)})"
    if hooked := _hooked(theta, "_backward_hooks"):
        return f"gradient hooks of parameters ({listed(hooked)}) would not see gradients at the interpolated weights"
    if scripted := _scripted(model):
        return f"TorchScript ({scripted}) keeps its weights out of reach"
    return None


def _scripted(model: nn.Module) -> str:
    """The modules that are TorchScript's, empty if there are none."""
    return listed(n or "the model" for n, module in model.named_modules() if isinstance(module, torch.jit.ScriptModule))


CHECKPOINTED = (
    "regularizer(...) can't be used with gradient checkpointing or other hooks on saved tensors: they would be "
    "recomputed at theta. Use regularizer.backward(loss_fn), which is right with them."
)


def has_reentrant_checkpoint(output: Any) -> bool:
    """Whether `torch.utils.checkpoint` with `use_reentrant=True` is part of the graph; no hook of torch tells."""
    nodes = [x.grad_fn for x in tree_leaves(output) if isinstance(x, Tensor) and x.grad_fn is not None]
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        if node.name() == "CheckpointFunctionBackward":
            return True
        new = {following for following, _ in node.next_functions if following is not None} - seen
        seen |= new
        nodes += new
    return False
