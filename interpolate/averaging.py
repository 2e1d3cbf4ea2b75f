"""Averages of the weights along the trajectory of training: equal weights, exponential, the latest few."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from interpolate._names import by_bare_name, unwrapped
from interpolate._sharding import like, local
from interpolate.batchnorm import reestimate_batchnorm
from interpolate.weights import applied, check_match, trainable_weights


class WeightAverager(ABC):
    """What the averagers share: a snapshot every `cycle_steps` steps after the first `start_step` steps.

    Trainable weights are averaged, by name, in float32 (float64 weights in float64): a mean kept in half precision
    drifts far more than rounding. Buffers are copied from the model at every snapshot, not averaged. Under FSDP2 every
    rank averages its shards and nothing is communicated.

    Args:
        model: The model being trained, wrapped or sharded as it may be; it is neither copied nor kept busy, only read
            at every snapshot.
        start_step: Number of steps before averaging starts, the paper's T; the anchor itself is never averaged.
        cycle_steps: Steps from one snapshot to the next, the paper's c, at least 1.
        device: Where the average is kept, for instance "cpu"; by default with the weights.

    Raises:
        ValueError: An argument is out of its range.
    """

    _n_sets = 1

    def __init__(
        self,
        model: nn.Module,
        *,
        start_step: int = 0,
        cycle_steps: int = 1,
        device: torch.device | str | None = None,
    ) -> None:
        if start_step < 0:
            raise ValueError(f"start_step must not be negative, got {start_step}.")
        if cycle_steps < 1:
            raise ValueError(f"cycle_steps must be at least 1, got {cycle_steps}.")
        self.model = model
        self.start_step = start_step
        self.cycle_steps = cycle_steps
        self.device = None if device is None else torch.device(device)
        self.step = 0
        """Updates so far."""
        self.n_averaged = 0
        """Snapshots taken so far."""
        theta = trainable_weights(model)
        self._sets = [{name: self._accumulator(p) for name, p in theta.items()} for _ in range(self._n_sets)]
        self.buffers: dict[str, Tensor] = {name: buffer.clone() for name, buffer in self._live_buffers().items()}
        """The model's buffers by name, as of the last snapshot or of `reestimate_batchnorm`."""

    @torch.no_grad()
    def update(self) -> None:
        """Count one step of training; on the schedule, take the weights into the average. Call it after the optimizer.

        Raises:
            WeightMismatchError: The model's trainable weights are no longer those that have been averaged.
        """
        self.step += 1
        if self.step <= self.start_step or (self.step - self.start_step) % self.cycle_steps:
            return
        theta = trainable_weights(self.model)
        check_match(theta, self._sets[0])
        self._sets = [{name: s[name].to(self.device or p.device) for name, p in theta.items()} for s in self._sets]
        averages = [[local(tensor) for tensor in s.values()] for s in self._sets]
        self._absorb(averages, [local(p).to(a) for p, a in zip(theta.values(), averages[0], strict=True)])
        for name, buffer in self._live_buffers().items():
            self.buffers[name] = buffer.clone()
        self.n_averaged += 1

    @abstractmethod
    def _absorb(self, averages: list[list[Tensor]], snapshot: list[Tensor]) -> None:
        """Take a snapshot into the local tensors of the averages, in place."""

    @property
    def weights(self) -> dict[str, Tensor]:
        """The average by name, in float32 or better. The tensors may be the averager's own: an update changes them.

        Raises:
            RuntimeError: Nothing has been averaged yet.
        """
        if self.n_averaged == 0:
            raise RuntimeError(
                f"no weights have been averaged: update() was called {self.step} times, and the first snapshot is due "
                f"at call {self.start_step + self.cycle_steps}."
            )
        return self._average()

    def _average(self) -> dict[str, Tensor]:
        return self._sets[0]

    def applied(self) -> AbstractContextManager[nn.Module]:
        """The model with the average and its buffers for the length of a `with` block; its own come back afterwards.

        Example:
            >>> import torch
            >>> model = torch.nn.Linear(1, 1)
            >>> averager = SWAAverager(model)
            >>> averager.update()
            >>> with averager.applied() as averaged:
            ...     output = averaged(torch.ones(1))
        """
        return applied(self.model, {**self.weights, **self.buffers})

    def reestimate_batchnorm(self, batches: Iterable[Any]) -> None:
        """Put BatchNorm statistics of the averaged model into `buffers`; see `interpolate.reestimate_batchnorm`."""
        with self.applied() as model:
            reestimate_batchnorm(model, batches)
            self.buffers = {name: buffer.clone() for name, buffer in self._live_buffers().items()}

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs; the tensors are the averager's own, as in `nn.Module.state_dict`.

        `torch.distributed.checkpoint` saves it under one world size and loads it under another.
        """
        averages = {str(i): dict(s) for i, s in enumerate(self._sets)}
        return {"step": self.step, "n_averaged": self.n_averaged, "averages": averages, "buffers": dict(self.buffers)}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken.

        Raises:
            WeightMismatchError: The state is of another model.
            ValueError: The state is of an averager with another number of averages.
        """
        averages = state["averages"]
        if len(averages) != len(self._sets):
            raise ValueError(f"the state holds {len(averages)} sets of weights, this averager {len(self._sets)}.")
        check_match(self.buffers, state["buffers"])
        for i, own in enumerate(self._sets):
            check_match(own, averages[str(i)])
        for i, own in enumerate(self._sets):
            for name, tensor in own.items():
                local(tensor).copy_(local(like(averages[str(i)][name], tensor)))
        for name, buffer in self.buffers.items():
            buffer.copy_(state["buffers"][name])
        self.step, self.n_averaged = int(state["step"]), int(state["n_averaged"])

    def _accumulator(self, p: Tensor) -> Tensor:
        dtype = torch.promote_types(torch.float32, p.dtype)
        return torch.zeros_like(p, dtype=dtype, requires_grad=False).to(self.device or p.device)

    def _live_buffers(self) -> dict[str, Tensor]:
        return by_bare_name(unwrapped(self.model).named_buffers())


class SWAAverager(WeightAverager):
    """Stochastic weight averaging: `theta_swa = (theta_swa * n + theta) / (n + 1)`.

    Averaging and interpolating commute, so the mean is taken of theta and patched once at the end. Re-estimate
    BatchNorm statistics for the averaged weights.

    Source: Weng et al. 2023 (arXiv 2302.00624), eq. 10 and algorithm 1; Izmailov et al. 2018 (arXiv 1803.05407).

    Args: As for `WeightAverager`.

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

    def _absorb(self, averages: list[list[Tensor]], snapshot: list[Tensor]) -> None:
        torch._foreach_lerp_(averages[0], snapshot, 1 / (self.n_averaged + 1))


class EMAAverager(WeightAverager):
    """Exponential moving average: `theta_ema = d * theta_ema + (1 - d) * theta`; the first snapshot starts it.

    With `warmup`, `d = min(decay, (1 + n) / (10 + n))` after n snapshots, so that early weights are soon forgotten.

    Source: Polyak & Juditsky 1992; the warm-up is that of TensorFlow's `ExponentialMovingAverage(num_updates)`.

    Args:
        decay: In [0, 1); the average reaches about `1 / (1 - decay)` snapshots back.
        warmup: Whether the decay begins lower.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> averager = EMAAverager(model, decay=0.5, warmup=False)
        >>> for value in (1.0, 2.0):
        ...     _ = torch.nn.init.constant_(model.weight, value)
        ...     averager.update()
        >>> averager.weights
        {'weight': tensor([[1.5000]])}
    """

    def __init__(self, model: nn.Module, decay: float = 0.999, *, warmup: bool = True, **schedule: Any) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {decay}.")
        super().__init__(model, **schedule)
        self.decay = decay
        self.warmup = warmup

    def _absorb(self, averages: list[list[Tensor]], snapshot: list[Tensor]) -> None:
        n = self.n_averaged
        decay = min(self.decay, (1 + n) / (10 + n)) if self.warmup else self.decay
        torch._foreach_lerp_(averages[0], snapshot, 1 - decay if n else 1)


class LAWAAverager(WeightAverager):
    """Latest weight averaging: the mean of the latest `k` snapshots, all of which are kept: k copies of the weights.

    Source: Kaddour 2022 (arXiv 2209.14981).

    Args:
        k: Number of snapshots, at least 1.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> averager = LAWAAverager(model, k=2)
        >>> for value in (1.0, 2.0, 3.0):
        ...     _ = torch.nn.init.constant_(model.weight, value)
        ...     averager.update()
        >>> averager.weights
        {'weight': tensor([[2.5000]])}
    """

    def __init__(self, model: nn.Module, k: int = 6, **schedule: Any) -> None:
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}.")
        self._n_sets = k
        super().__init__(model, **schedule)

    def _absorb(self, averages: list[list[Tensor]], snapshot: list[Tensor]) -> None:
        torch._foreach_copy_(averages[self.n_averaged % len(averages)], snapshot)

    def _average(self) -> dict[str, Tensor]:
        taken = self._sets[: self.n_averaged]
        mean = {name: tensor.clone() for name, tensor in taken[0].items()}
        for n, snapshot in enumerate(taken[1:], start=1):
            torch._foreach_lerp_([*map(local, mean.values())], [*map(local, snapshot.values())], 1 / (n + 1))
        return mean
