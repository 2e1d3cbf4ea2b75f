"""Stochastic weight averaging (SWA): the mean of the weights along the trajectory of training."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from interpolate.weights import applied, check_match, trainable_weights


class SWAAverager:
    """Keeps the mean of a model's weights, a snapshot every `cycle_steps` steps after the first `start_step` steps.

    `theta_swa = (theta_swa * n + theta) / (n + 1)`, in float32 (float64 weights in float64): a mean kept in half
    precision drifts far more than rounding. Trainable weights are averaged, by name; buffers are not: re-estimate
    BatchNorm statistics for the averaged weights. Averaging and interpolating commute, so the mean is taken of theta
    and patched once at the end.

    Source: Weng et al. 2023 (arXiv 2302.00624), eq. 10 and algorithm 1; Izmailov et al. 2018.

    Args:
        model: The model being trained; it is neither copied nor kept busy, only read at every snapshot.
        start_step: Number of steps before averaging starts, the paper's T; the anchor itself is never averaged.
        cycle_steps: Steps from one snapshot to the next, the paper's c, at least 1.

    Raises:
        ValueError: An argument is out of its range.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> averager = SWAAverager(model)
        >>> for value in (1.0, 2.0):
        ...     _ = torch.nn.init.constant_(model.weight, value)
        ...     averager.update()
        >>> averager.weights
        {'weight': tensor([[1.5000]])}
    """

    def __init__(self, model: nn.Module, *, start_step: int = 0, cycle_steps: int = 1) -> None:
        if start_step < 0:
            raise ValueError(f"start_step must not be negative, got {start_step}.")
        if cycle_steps < 1:
            raise ValueError(f"cycle_steps must be at least 1, got {cycle_steps}.")
        self.model = model
        self.start_step = start_step
        self.cycle_steps = cycle_steps
        self.step = 0
        """Updates so far."""
        self.n_averaged = 0
        """Snapshots in the mean."""
        self._mean = {name: _accumulator(p) for name, p in trainable_weights(model).items()}

    @torch.no_grad()
    def update(self) -> None:
        """Count one step of training; on the schedule, take the weights into the mean. Call it after the optimizer.

        Raises:
            WeightMismatchError: The model's trainable weights are no longer those that have been averaged.
        """
        self.step += 1
        if self.step <= self.start_step or (self.step - self.start_step) % self.cycle_steps:
            return
        theta = trainable_weights(self.model)
        check_match(theta, self._mean)
        self._mean = {name: self._mean[name].to(p.device) for name, p in theta.items()}
        means = list(self._mean.values())
        snapshot = [p.to(mean.dtype) for p, mean in zip(theta.values(), means, strict=True)]
        torch._foreach_lerp_(means, snapshot, 1 / (self.n_averaged + 1))
        self.n_averaged += 1

    @property
    def weights(self) -> dict[str, Tensor]:
        """The mean by name, in float32 or better. These are the averager's own tensors: the next update changes them.

        Raises:
            RuntimeError: Nothing has been averaged yet.
        """
        if self.n_averaged == 0:
            raise RuntimeError(
                f"no weights have been averaged: update() was called {self.step} times, and the first snapshot is due "
                f"at call {self.start_step + self.cycle_steps}."
            )
        return self._mean

    def applied(self) -> AbstractContextManager[nn.Module]:
        """The model with the mean as its weights for the length of a `with` block; its own come back afterwards.

        Example:
            >>> import torch
            >>> model = torch.nn.Linear(1, 1)
            >>> averager = SWAAverager(model)
            >>> averager.update()
            >>> with averager.applied() as averaged:
            ...     output = averaged(torch.ones(1))
        """
        return applied(self.model, self.weights)

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs; the tensors are the averager's own, as in `nn.Module.state_dict`."""
        return {"step": self.step, "n_averaged": self.n_averaged, "mean": dict(self._mean)}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken.

        Raises:
            WeightMismatchError: The state is of another model.
        """
        check_match(self._mean, state["mean"])
        for name, mean in self._mean.items():
            mean.copy_(state["mean"][name])
        self.step, self.n_averaged = int(state["step"]), int(state["n_averaged"])


def _accumulator(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter, dtype=torch.promote_types(torch.float32, parameter.dtype), requires_grad=False)
