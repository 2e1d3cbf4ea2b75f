"""Interpolated weight regularization (IWR): keep the whole path from the anchor to theta good while fine-tuning."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from interpolate._adapters import Adapters
from interpolate._alphas import AlphaSequence
from interpolate._sharding import inner, is_sharded, like, local
from interpolate._strategies import (
    CHECKPOINTED,
    STRATEGIES,
    call_at,
    check_hooks,
    choose_strategy,
    has_reentrant_checkpoint,
    without_gradient,
)
from interpolate._theta_only import ThetaOnly
from interpolate.errors import WeightMismatchError
from interpolate.pulling import pull_tensors
from interpolate.weights import Weights, check_match, check_there, listed, trainable_weights

T = TypeVar("T")


class InterpolatedWeightRegularizer(AlphaSequence):
    """Adds the loss at weights between the anchor and theta to the loss at theta.

    Each step draws `alpha ~ U(0, max_alpha)` and minimises `L(theta) + beta * L(alpha * anchor + (1 - alpha) * theta)`
    with `beta = strength / (1 - alpha)`. Its gradient is `g(theta) + strength * g(theta_tilde)`: beta cancels the
    factor `1 - alpha` of the chain rule. A step costs two forward and two backward passes.

    Parameters that are frozen or not floating point are left to the plain pass, gradients included, and so is the state
    of modules: buffers, and tensors and containers of Python's in their attributes (caches, counters, metrics). Objects
    of other kinds, and what `loss_fn` changes outside of the model, see both passes. Dropout draws a mask in each.

    With LoRA (PEFT's layers and those with an attribute `scaling`) the anchor is the base model, with adapters that are
    frozen, whatever the trained ones hold: their update is interpolated, by its scale, as
    `anchor + (1 - alpha) * s * B @ A`, with the exact gradient of both factors. Neither the base nor the factors are in
    `anchor`. DoRA and other adapters are refused, and those that begin by changing the base, as PiSSA does.

    Under DDP, give the wrapped model: the pass at the interpolated weights communicates nothing, and the plain one
    synchronises the sum of both. Where `find_unused_parameters` is needed, both passes must use the same parameters.
    Weights sharded by FSDP2 (`fully_shard`) are swapped in place, shard by shard; each pass then gathers and reduces.

    Source: Weng et al. 2023 (arXiv 2302.00624), eq. 6-9 and algorithm 1. Departs from the published code in that alpha
    is a function of (`seed`, step, rank or micro-batch), so that a run can be repeated and resumed. The one-pass
    estimators are ours.

    Args:
        model: The model being fine-tuned, wrapped by DDP or `torch.compile` or sharded by FSDP2 as it may be.
        max_alpha: Upper end of the range of alpha, in [0, 1); published: 0.6.
        strength: Weight of the regularizing gradient, the paper's C, not negative; published: 0.5.
        anchor: The pretrained weights by name, without wrappers' prefixes; by default a copy of the weights now.
        theta_only: Patterns of what the anchor does not have, such as `"head.*"`, a new head, or the rows that were
            added to those of the anchor, `"embed.weight[32000:]"`: it is theta's in both passes. Its gradient is that
            of all else, `g(theta) + strength * g(theta_tilde)`, as if its anchor were wherever it is itself.
        anchor_device: Where the anchor is kept, by default beside the weights. With `"cpu"` an accelerator has no copy
            of it: in each step it passes by, a weight at a time. Not for sharded weights.
        seed: Seed of the sequence of alphas; the same on every rank.
        passes: `"both"` computes the gradient above. Two unbiased estimates of it cost a single pass and have more
            variance: `"split"` gives one half of each batch to either term, so a batch must be in random order;
            `"random"` computes `(1 + strength)` times one of the terms, theta's with probability `1 / (1 + strength)`.
        strategy: How weights are put under the model: `"functional"` (nothing is touched) or `"in_place"` (swapped in
            the live model and restored after backward). None takes the first wherever it is right.
        alpha_per_rank: Whether every rank draws an alpha of its own, by its rank when alpha is drawn. None: yes, except
            where weights are sharded.

    Raises:
        ValueError: An argument is out of its range, or would be wrong for this model.
        WeightMismatchError: The anchor's names or shapes are not those of the model.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1)
        >>> regularizer = InterpolatedWeightRegularizer(model, max_alpha=0.6, strength=0.5)
        >>> x, y = torch.ones(4, 2), torch.zeros(4, 1)
        >>> loss = regularizer.backward(lambda model: torch.nn.functional.mse_loss(model(x), y))
        >>> model.weight.grad.shape
        torch.Size([1, 2])
    """

    def __init__(
        self,
        model: nn.Module,
        max_alpha: float = 0.6,
        strength: float = 0.5,
        *,
        anchor: Weights | None = None,
        theta_only: Sequence[str] = (),
        anchor_device: torch.device | str | None = None,
        seed: int = 0,
        passes: Literal["both", "split", "random"] = "both",
        strategy: Literal["functional", "in_place"] | None = None,
        alpha_per_rank: bool | None = None,
    ) -> None:
        if not 0 <= max_alpha < 1:
            raise ValueError(f"max_alpha is the largest weight of the anchor and must be in [0, 1), got {max_alpha}.")
        if not 0 <= strength < float("inf"):
            raise ValueError(f"strength must be finite and not negative, got {strength}.")
        if passes not in ("both", "split", "random"):
            raise ValueError(f"passes must be 'both', 'split' or 'random', got {passes!r}.")
        theta = trainable_weights(model)
        if not theta:
            raise ValueError(f"{type(model).__name__} has no trainable floating-point parameter to regularize.")
        self.strategy = choose_strategy(model, theta, strategy, through_wrapper=passes == "random")
        """How weights are put under the model: `functional` or `in_place`."""
        self._parts, self._adapters = ThetaOnly(theta_only, theta), Adapters(model, theta)
        self._parts.own |= self._adapters.factors
        shared = self._parts.shared(theta)
        anchor = self._parts.paired(theta, shared if anchor is None else anchor)
        if any(is_sharded(theta[name]) for name in self._parts.rows):
            raise ValueError("theta_only: rows of sharded weights can't be told apart; name the whole weights.")
        anchor = {
            n: self._parts.completed(n, anchor[n], theta[n]) if n in self._parts.rows else anchor[n] for n in anchor
        }
        _check_anchor(shared, anchor)
        sharded = any(map(is_sharded, theta.values()))
        if sharded and anchor_device is not None:
            raise ValueError("anchor_device is for whole weights: of sharded ones each rank keeps its own shards only.")
        self.anchor_device = None if anchor_device is None else torch.device(anchor_device)
        self.anchor: dict[str, Tensor] = {n: self._kept(anchor[n].detach(), p).clone() for n, p in shared.items()}
        """The weights to stay near, by name; in the dtype, on the device and in the shards of the model's, unless there
        is a device for them."""
        if self.anchor_device is None:
            check_there(self.anchor)
        if sharded and alpha_per_rank:
            raise ValueError("alpha_per_rank=True is wrong where weights are sharded: they make one set of weights.")
        super().__init__(max_alpha, seed, shared=sharded if alpha_per_rank is None else not alpha_per_rank)
        self._agree_on_seed()
        self.passes = passes
        self.model = model
        self.strength = strength
        self.interpolated_loss: Tensor | None = None
        """The loss at the interpolated weights of the last `backward`, detached; for logs. None with `strength=0`, and
        where `passes="random"` has drawn theta."""
        self._ended_by = -1

    @property
    def beta(self) -> float:
        """The factor of the regularizing loss in this step, `strength / (1 - alpha)`."""
        return self.strength / (1 - self.alpha)

    def backward(self, loss_fn: Callable[..., Tensor], *batch: Any, index: int | None = None) -> Tensor:
        """Accumulate `g(theta) + strength * g(theta_tilde)` in the parameters' `.grad`; one graph is alive at a time.

        Every call is a step with an alpha of its own. To accumulate gradients, call this once for each part of the
        batch, under DDP within `no_sync()` as usual, and in `with one_step():` if the parts are to share a step: each
        then has the alpha of its index, however many processes share the work. The closure of an optimizer, which
        LBFGS calls several times, keeps one alpha for the optimizer's step.

        With a `GradScaler`, return `scaler.scale(loss)` from `loss_fn`. What this returns, and `interpolated_loss`, are
        then scaled too; `/ scaler.get_scale()`, before `scaler.update()`, gives the losses.

        Args:
            loss_fn: Computes the loss of this step with the model that it is given first, and no other reference to
                it. Called twice; once with `strength=0`, and with `max_alpha=0`, where both terms are at theta, unless
                complex parameters are trained, of which the second knows nothing.
            batch: What else `loss_fn` is called with. `passes="split"` needs it: every tensor in it, however nested,
                is halved along its first dimension.
            index: Which alpha of this step to use, by default that of the rank; where weights are sharded, the same
                on every rank.

        Returns:
            The loss at theta, detached; the one at the interpolated weights is left in `interpolated_loss`. With
            `passes="random"`, the loss of the one pass made.

        Raises:
            WeightMismatchError: The model's trainable weights are no longer those of the anchor.
            RuntimeError: The loss was computed with other weights than those of the model given to `loss_fn`.
            ValueError: The batch can't be halved.
        """
        self._agree_on_seed()
        others = any(p.requires_grad and not p.is_floating_point() for p in self.model.parameters())  # plain pass only
        if not self.strength or not (self.max_alpha or others):  # nothing is added, or both terms are at theta
            loss = _accumulate(self.model, loss_fn, batch, 1 + self.strength)
            self.interpolated_loss = loss if self.strength else None
        elif self.passes == "random":
            loss = self._either_pass(loss_fn, batch, index)
        else:
            first, second = _halves(batch) if self.passes == "split" else (batch, batch)
            # This pass comes first: its graph and weights are gone when the plain pass begins, which lowers the peak
            # of memory, and DDP synchronises what both have left in .grad.
            self.interpolated_loss = self._interpolated(inner(self.model), loss_fn, first, self.strength, index)
            loss = _accumulate(self.model, loss_fn, second, 1)
        self._end_call()
        return loss

    def run_interpolated(self, function: Callable[[nn.Module], T], *, index: int | None = None) -> T:
        """Call a function with the model at this step's interpolated weights, for trainers with a step of their own.

        The function computes its loss with the model that it is given and calls backward on `strength` times it; the
        gradients are added to the parameters' `.grad`. The trainer's plain pass comes afterwards and synchronises both
        under DDP. With `strategy="in_place"`, its forward pass too must come afterwards. Steps and `index` are as for
        `backward`.

        Returns:
            What the function returns.
        """
        self._agree_on_seed()
        result = self._run(inner(self.model), function, index)
        self._end_call()
        return result

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward pass at this step's interpolated weights, for loops that write the two terms themselves.

        Gradients flow to theta through the interpolation, so the term is to be multiplied by `beta`:
        `(criterion(model(x), y) + regularizer.beta * criterion(regularizer(x), y)).backward()`. The same alpha holds
        until a backward pass has gone through; then the next step begins. For a single process, without gradient
        checkpointing: its recomputation would see theta.

        Raises:
            RuntimeError: `backward(loss_fn)` has to be used, for the reason given; or in the backward pass, if another
                one has already ended the step of this forward pass.
        """
        if self.strategy != "functional" or inner(self.model) is not self.model or self.passes != "both":
            raise RuntimeError(
                "regularizer(...) is for the functional strategy in a single process with passes='both'; "
                f"here strategy={self.strategy!r}, passes={self.passes!r}, model={type(self.model).__name__}. "
                "Use regularizer.backward(loss_fn)."
            )
        step, theta = self.step, self._trainable()
        anchor = self._anchor_of(theta)
        factors = self._adapters.factors  # theirs is the gradient at the scaled update
        tilde = {
            n: p.view_as(p) if n in factors else torch.lerp(p, anchor[n].to(p.device), self.alpha)
            for n, p in theta.items()
        }
        stand_ins = {id(p): tilde[name] for name, p in theta.items()}
        if not torch.is_grad_enabled():
            with self._adapters.scaled(1 - self.alpha):
                return call_at(self.model, stand_ins, lambda model: model(*args, **kwargs))
        torch.autograd.graph.register_multi_grad_hook(tuple(tilde.values()), lambda _: self._end(step), mode="any")
        with self._adapters.scaled(1 - self.alpha), torch.autograd.graph.disable_saved_tensors_hooks(CHECKPOINTED):
            output = call_at(self.model, stand_ins, lambda model: model(*args, **kwargs))
        if has_reentrant_checkpoint(output):
            raise RuntimeError(CHECKPOINTED)
        return output

    def move_anchor(self, toward: Weights | None = None, *, weight: float = 1.0) -> None:
        """Let the anchor follow: it becomes `weight * toward + (1 - weight) * anchor`, in place.

        The weights given, or learnt so far, are what the next steps stay near. Saved with `state_dict`. The anchor has
        the dtype of the model, and in half precision many small moves are lost to rounding: let an `EMAAverager` follow
        theta then, and move to its weights.

        Source: Gorbatovski et al. 2024 (arXiv 2404.09656), "Learn your reference model".

        Args:
            toward: By name, as for `anchor`; by default theta, the model's weights now.
            weight: Weight of `toward`, in [0, 1].
        """
        theta = self._trainable()
        if self._adapters.factors:
            raise ValueError(
                "the anchor of adapters is the base model, which does not move: merge them and train anew."
            )
        toward = theta if toward is None else toward
        toward = {n: self._parts.completed(n, t, theta[n]) for n, t in self._parts.paired(theta, toward).items()}
        pull_tensors(self.anchor, toward, weight, sides=("the anchor", "toward"))

    def at_anchor(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward pass at the anchor, without gradient: a teacher for the loss; see `run_at_anchor`."""
        return self.run_at_anchor(lambda model: model(*args, **kwargs))

    def run_at_anchor(self, function: Callable[[nn.Module], T]) -> T:
        """Call a function with the model at the anchor and its own buffers, without gradient; it ends no step.

        As `WeightAverager.run` does for an average: at any time, and nothing of the model changes.
        """
        theta = self._trainable()
        with self._adapters.scaled(0):
            return without_gradient(self.model, self._anchor_of(theta), {}, function)

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs: the step, the seed and the anchor."""
        return {"step": self.step, "seed": self.seed, "anchor": dict(self.anchor)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken; the anchor comes back too, whatever the model's weights are now."""
        _check_anchor(self.anchor, state["anchor"])
        for name, tensor in self.anchor.items():
            local(tensor).copy_(local(like(state["anchor"][name], tensor)))
        self.step, self.seed = int(state["step"]), int(state["seed"])

    def _trainable(self) -> dict[str, nn.Parameter]:
        """The model's trainable weights, in the order of the anchor, which follows them to their device and dtype."""
        theta = trainable_weights(self.model)
        if self.strategy == "functional" and any(map(is_sharded, theta.values())):
            raise RuntimeError("the model has been sharded since the regularizer was made; make it after fully_shard.")
        check_hooks(theta, self.strategy)
        shared = self._parts.shared(theta)
        check_match(shared, self.anchor)
        self.anchor = {name: self._kept(self.anchor[name], p) for name, p in shared.items()}
        for name, n in self._parts.rows.items():
            self.anchor[name][n:] = theta[name].detach()[n:]
        return theta

    def _kept(self, anchor: Tensor, theta: Tensor) -> Tensor:
        """A weight of the anchor as it is kept, itself if it is so already."""
        return like(anchor, theta) if self.anchor_device is None else anchor.to(self.anchor_device, theta.dtype)

    def _anchor_of(self, theta: Mapping[str, Tensor]) -> Weights:
        """The anchor with what is only theta's, which is where theta is."""
        return {name: self.anchor[name] if name in self.anchor else p.detach() for name, p in theta.items()}

    def _run(self, model: nn.Module, function: Callable[[nn.Module], T], index: int | None) -> T:
        theta, alpha = self._trainable(), self.alpha_of(index)
        with self._adapters.interpolated(alpha, theta):
            return STRATEGIES[self.strategy](model, theta, self._anchor_of(theta), alpha, function)

    def _interpolated(
        self, model: nn.Module, loss_fn: Callable[..., Tensor], batch: tuple, factor: float, index: int | None
    ) -> Tensor:
        """One pass at the interpolated weights; its loss."""
        return self._run(model, lambda model: _accumulate(model, loss_fn, batch, factor), index)

    def _either_pass(self, loss_fn: Callable[..., Tensor], batch: tuple, index: int | None) -> Tensor:
        """One of the two passes, drawn in proportion to its weight, which makes its gradient an unbiased estimate."""
        total, generator = 1 + self.strength, self._generator(index)
        generator.random()  # the first draw is alpha
        if generator.random() * total < 1:
            self.interpolated_loss = None
            return _accumulate(self.model, loss_fn, batch, total)
        self.interpolated_loss = self._interpolated(self.model, loss_fn, batch, total, index)
        return self.interpolated_loss

    def _end(self, step: int) -> None:
        """Called in every backward pass through forward calls of `step`, once for each of these calls."""
        backward_pass = torch._C._current_graph_task_id()  # as torch.autograd.graph tells them apart
        if step == self.step:
            if backward_pass != self._ended_by:
                self._end_call()
            self._ended_by = backward_pass
        elif backward_pass != self._ended_by:
            raise RuntimeError(
                f"this backward pass goes through a forward pass of step {step}, but step {step} has ended: a backward "
                "pass had already gone through it, and alpha and beta have moved on. Add the losses of one step up and "
                "call backward once, or use regularizer.backward(loss_fn)."
            )


def _check_anchor(theta: Weights, anchor: Weights) -> None:
    check_match(theta, anchor)
    codes = [f"{name} ({str(anchor[name].dtype)[6:]})" for name in theta if not anchor[name].is_floating_point()]
    if codes:
        raise WeightMismatchError(
            f"{len(codes)} of {len(theta)} weights of the anchor ({listed(codes)}) are not floating point: the codes "
            "of quantised weights mean nothing without their scales. Give the weights from before quantisation."
        )


def _accumulate(model: nn.Module, loss_fn: Callable[..., Tensor], batch: tuple, factor: float) -> Tensor:
    loss = loss_fn(model, *batch)
    if not isinstance(loss, Tensor):
        raise TypeError(f"loss_fn must return the loss, a tensor with one element, got {type(loss).__name__}.")
    (loss if factor == 1 else factor * loss).backward()
    return loss.detach()


def _halves(batch: tuple) -> tuple[tuple, tuple]:
    sizes = {x.shape[0] if x.ndim else 0 for x in tree_leaves(batch) if isinstance(x, Tensor)}
    if len(sizes) != 1 or min(sizes) < 2:
        raise ValueError(
            "passes='split' halves the batch given to backward(loss_fn, *batch): its tensors must have the same first "
            f"dimension, at least 2; got {sorted(sizes) or 'no tensor'}."
        )
    half = sizes.pop() // 2
    first, second = (
        tree_map(lambda x, part=part: x[part] if isinstance(x, Tensor) else x, batch)
        for part in (slice(None, half), slice(half, None))
    )
    return first, second
