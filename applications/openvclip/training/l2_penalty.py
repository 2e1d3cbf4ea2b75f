"""The baseline of the paper's Table 5: keep weights near the anchor by a penalty on the distance."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from interpolate.weights import trainable_weights


class L2Penalty:
    """Minimises `L(theta) + 0.5 * strength * ||theta - anchor||^2`; the trainer takes it in place of a regularizer.

    Source: Weng et al. 2023 (arXiv 2302.00624), section 5.3, with strength 1. A strength of 0 is plain fine-tuning.

    Args:
        model: The model being fine-tuned; the anchor is a copy of its trainable weights now.
        strength: Weight of the penalty, not negative.
    """

    interpolated_loss: Tensor | None = None
    step = 0

    def __init__(self, model: nn.Module, strength: float) -> None:
        if not 0 <= strength < float("inf"):
            raise ValueError(f"strength must be finite and not negative, got {strength}.")
        self.model = model
        self.strength = strength
        self.anchor = {name: p.detach().clone() for name, p in trainable_weights(model).items()}

    def alpha_of(self, index: int) -> float:
        return 0.0

    def backward(self, loss_fn: Callable[..., Tensor], *batch: Tensor, index: int) -> Tensor:
        """Accumulate `g(theta)` in the parameters' `.grad`; returns the loss, detached."""
        loss = loss_fn(self.model, *batch)
        loss.backward()
        return loss.detach()

    @contextmanager
    def one_step(self) -> Iterator[None]:
        """A step, whatever its micro-batches: at its end `strength * (theta - anchor)` is added to the gradients."""
        yield
        if self.strength:
            with torch.no_grad():
                for name, p in trainable_weights(self.model).items():
                    difference = self.strength * (p - self.anchor[name])
                    p.grad = difference if p.grad is None else p.grad.add_(difference)
        self.step += 1
