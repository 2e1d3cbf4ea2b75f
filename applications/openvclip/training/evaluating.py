"""Evaluation while training goes on: when, of which weights, and what the best is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from applications.openvclip.training.step import Step

Accuracies = dict[str, dict[str, float]]
"""In [0, 1], by protocol, then by anchor weight, and of CLIP*."""


@dataclass(frozen=True)
class Evaluating:
    """What the average of the weights is worth on the way. Training goes on as if nobody had looked."""

    every_steps: int
    accuracies: Callable[[dict[str, Tensor], Callable[[], object]], Accuracies]
    """Of weights; calls back as it gets on. All processes call it together, and all of them get the result."""
    anchor_weight: float
    """The one that the final model is to have."""
    best_by: tuple[str, ...]
    """The protocols whose mean accuracy there, at the anchor weight, tells which weights are best."""

    def is_due(self, step: int) -> bool:
        return step > 0 and step % self.every_steps == 0

    def __call__(self, step: Step, advance: Callable[[], object]) -> tuple[float, dict[str, Any]]:
        """Evaluate the average so far, or the weights themselves before there is one.

        Args:
            step: Whose weights.
            advance: Called as the evaluation gets on; an exception from it ends the evaluation.

        Returns:
            The value by which weights are compared, and what is worth writing down.
        """
        weights, n_averaged = step.average()
        accuracy = self.accuracies(weights, advance)
        step.model.train()  # the models of an evaluation share modules with it
        value = sum(accuracy[name][f"{self.anchor_weight:g}"] for name in self.best_by) / len(self.best_by)
        return value, {
            "weights": f"mean of {n_averaged}" if n_averaged else "last",
            "anchor_weight": self.anchor_weight,
            "accuracy": accuracy,
            "best_by": list(self.best_by),
            "value": value,
        }
