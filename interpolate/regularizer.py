"""Interpolated weight regularization (IWR): keep the whole path from the anchor to theta good while fine-tuning."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from interpolate.weights import Weights, check_match, trainable_weights


class InterpolatedWeightRegularizer:
    """Adds the loss at weights between the anchor and theta to the loss at theta.

    Each step draws `alpha ~ U(0, max_alpha)` and minimises `L(theta) + beta * L(alpha * anchor + (1 - alpha) * theta)`
    with `beta = strength / (1 - alpha)`. Its gradient is `g(theta) + strength * g(theta_tilde)`: beta cancels the
    factor `1 - alpha` of the chain rule. A step costs two forward and two backward passes.

    The model is evaluated at the interpolated weights by `torch.func.functional_call`: no module is copied, buffers
    (BatchNorm statistics, counters) are those of the plain pass only. Parameters that are frozen or not floating point
    are left to the plain pass, gradients included. Dropout draws a new mask in each pass.

    Source: Weng et al. 2023 (arXiv 2302.00624), eq. 6-9 and algorithm 1. Departs from the published code in that alpha
    is a function of (`seed`, step), so that a run can be repeated and resumed.

    Args:
        model: The model being fine-tuned. Single process; sharded or wrapped models are refused.
        max_alpha: Upper end of the range of alpha, in [0, 1); published: 0.6.
        strength: Weight of the regularizing gradient, the paper's C, not negative; published: 0.5.
        anchor: The pretrained weights by name; by default a copy of the model's weights now.
        seed: Seed of the sequence of alphas.

    Raises:
        ValueError: An argument is out of its range, or the model can't be evaluated at other weights.
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
        seed: int = 0,
    ) -> None:
        if not 0 <= max_alpha < 1:
            raise ValueError(f"max_alpha is the largest weight of the anchor and must be in [0, 1), got {max_alpha}.")
        if not 0 <= strength < float("inf"):
            raise ValueError(f"strength must be finite and not negative, got {strength}.")
        check_functional(model)
        theta = trainable_weights(model)
        if not theta:
            raise ValueError(f"{type(model).__name__} has no trainable floating-point parameter to regularize.")
        anchor = theta if anchor is None else anchor
        check_match(theta, anchor)
        self.anchor: dict[str, Tensor] = {n: anchor[n].detach().to(p, copy=True) for n, p in theta.items()}
        """The weights to stay near, by name; in the dtype and on the device of the model's."""
        self.model = model
        self.max_alpha = max_alpha
        self.strength = strength
        self.seed = seed
        self.interpolated_loss: Tensor | None = None
        """The loss at the interpolated weights of the last `backward`, detached; for logs."""
        self.step = 0
        """How many alphas have been used up: one per `backward`, or per backward pass through a forward call."""
        self._ended_by = -1
        self._bound = _Bound(model)

    @property
    def alpha(self) -> float:
        """The weight of the anchor in this step, in [0, max_alpha): a function of (seed, step) alone."""
        return self.max_alpha * random.Random(f"interpolate/{self.seed}/{self.step}").random()

    @property
    def beta(self) -> float:
        """The factor of the regularizing loss in this step, `strength / (1 - alpha)`."""
        return self.strength / (1 - self.alpha)

    def backward(self, loss_fn: Callable[[nn.Module], Tensor]) -> Tensor:
        """Accumulate `g(theta) + strength * g(theta_tilde)` in the parameters' `.grad`; one graph is alive at a time.

        Args:
            loss_fn: Computes the loss of this step's batch with the model that it is given. Called twice.

        Returns:
            The loss at theta, detached; the one at the interpolated weights is left in `interpolated_loss`.

        Raises:
            WeightMismatchError: The model's trainable weights are no longer those of the anchor.
        """
        theta = self._trainable()
        with torch.no_grad():
            mixed = torch._foreach_lerp(list(theta.values()), list(self.anchor.values()), self.alpha)
        # This pass comes first: its graph and weights are gone when the plain pass begins, which lowers the peak of
        # memory. Its leaves share .grad with the parameters, so that both passes add to the same tensors.
        tilde = dict(zip(theta, mixed, strict=True))
        for name, leaf in tilde.items():
            leaf.requires_grad_().grad = theta[name].grad

        def accumulate(model: nn.Module) -> Tensor:
            loss = loss_fn(model)
            (self.strength * loss).backward()  # inside the call: checkpointed layers are recomputed at these weights
            return loss.detach()

        self.interpolated_loss = self._at(tilde, accumulate)
        for name, leaf in tilde.items():
            theta[name].grad = leaf.grad
        del tilde, mixed

        loss = loss_fn(self.model)
        loss.backward()
        self.step += 1
        return loss.detach()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward pass at this step's interpolated weights, for loops that write the two terms themselves.

        Gradients flow to theta through the interpolation, so the term is to be multiplied by `beta`:
        `(criterion(model(x), y) + regularizer.beta * criterion(regularizer(x), y)).backward()`. The same alpha holds
        until a backward pass has gone through; then the next step begins.

        Raises:
            RuntimeError: In the backward pass, if another one has already ended the step of this forward pass.
        """
        step, theta = self.step, self._trainable()
        tilde = {name: torch.lerp(p, self.anchor[name], self.alpha) for name, p in theta.items()}
        if torch.is_grad_enabled():
            torch.autograd.graph.register_multi_grad_hook(tuple(tilde.values()), lambda _: self._end(step), mode="any")
        return self._at(tilde, lambda model: model(*args, **kwargs))

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs: the step, the seed and the anchor."""
        return {"step": self.step, "seed": self.seed, "anchor": dict(self.anchor)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken; the anchor comes back too, whatever the model's weights are now."""
        check_match(self.anchor, state["anchor"])
        for name, tensor in self.anchor.items():
            tensor.copy_(state["anchor"][name])
        self.step, self.seed = int(state["step"]), int(state["seed"])

    def _trainable(self) -> dict[str, nn.Parameter]:
        """The model's trainable weights, in the order of the anchor, which follows them to their device and dtype."""
        theta = trainable_weights(self.model)
        check_match(theta, self.anchor)
        self.anchor = {name: self.anchor[name].to(p) for name, p in theta.items()}
        return theta

    def _at(self, weights: Weights, function: Callable[[nn.Module], Any]) -> Any:
        """The value of a function of the model, computed with the given weights in place of its trainable ones."""
        constants = {name: p.detach() for name, p in self.model.named_parameters()}
        parameters = {f"model.{name}": p for name, p in (constants | dict(weights)).items()}
        buffers = {f"model.{name}": buffer.clone() for name, buffer in self.model.named_buffers()}
        return functional_call(self._bound, (parameters, buffers), (function,), strict=True)

    def _end(self, step: int) -> None:
        """Called in every backward pass through forward calls of `step`, once for each of these calls."""
        backward_pass = torch._C._current_graph_task_id()  # as torch.autograd.graph tells them apart
        if step == self.step:
            self.step, self._ended_by = step + 1, backward_pass
        elif backward_pass != self._ended_by:
            raise RuntimeError(
                f"this backward pass goes through a forward pass of step {step}, but step {step} has ended: a backward "
                "pass had already gone through it, and alpha and beta have moved on. Add the losses of one step up and "
                "call backward once, or use regularizer.backward(loss_fn)."
            )


class _Bound(nn.Module):
    """Lets `functional_call` put weights under any function of a model, and not under its forward pass alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[[nn.Module], Any]) -> Any:
        return function(self.model)


def check_functional(model: nn.Module) -> None:
    """Raise `ValueError` for models on which `functional_call` is silently wrong."""
    names: dict[nn.Module, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if module in names:
            raise ValueError(
                f"{type(module).__name__} is reachable under two names, {names[module]!r} and {name!r}; "
                "torch.func.functional_call corrupts such a model. Keep one of them in a list or a property instead."
            )
        names[module] = name
    if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        raise ValueError(
            f"{type(model).__name__} would not synchronise the gradients at the interpolated weights; "
            "this version regularizes a model in a single process only."
        )
    sharded = [name for name, p in model.named_parameters() if hasattr(p, "device_mesh")]
    if sharded:
        raise ValueError(
            f"{len(sharded)} parameters are sharded ({sharded[0]!r}, …); torch.func.functional_call ignores the "
            "weights that it is given for such a model. This version regularizes a model in a single process only."
        )
