"""Averages of the weights along the trajectory of training: equal weights, exponential, the latest few."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from interpolate._averager import WeightAverager
from interpolate._sharding import local

_CHUNK = 2**17
"""Numbers cast to float64 at a time on a CPU: the cast ones stay in its cache."""

_HEAVIEST = 2.0**60
"""Total weight at which a sum is scaled down, far from where float64 would overflow."""


class _WeightedMean(WeightAverager):
    """`sum(w_n * theta_n) / sum(w_n)`, for any weights that are known when a snapshot is taken."""

    @abstractmethod
    def _weight(self) -> float:
        """The weight of the next snapshot where those so far weigh `_total_weight` together."""

    def _absorb(self, snapshot: list[Tensor]) -> None:
        weight = self._weight()
        sums = [local(total) for total in self._sets[0].values()]
        if self._total_weight + weight > _HEAVIEST:
            scale = 2.0 ** -math.frexp(self._total_weight + weight)[1]  # a power of two: exact
            torch._foreach_mul_(sums, scale)
            self._total_weight *= scale
            weight *= scale
        for total, theta in zip(sums, snapshot, strict=True):
            _add(total, theta.to(total.device), weight)
        self._total_weight += weight


class SWAAverager(_WeightedMean):
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

    def _weight(self) -> float:
        return 1.0


class EMAAverager(_WeightedMean):
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

    def _weight(self) -> float:
        n = self.n_averaged
        decay = min(self.decay, (1 + n) / (10 + n)) if self.warmup else self.decay
        decay = max(decay, 2.0**-900)  # 0 too: what is left of earlier snapshots is below the least float32
        return self._total_weight * (1 - decay) / decay if n else 1.0


class LAWAAverager(WeightAverager):
    """Latest weight averaging: the mean of the latest `k` snapshots, all of which are kept: k copies of the weights.

    They are kept in the weights' own dtype, and an update takes as long as one copy; `weights` sums them in float64.

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

    def _kept_dtype(self, p: Tensor) -> torch.dtype:
        return p.dtype

    def _absorb(self, snapshot: list[Tensor]) -> None:
        slot = self._sets[self.n_averaged % len(self._sets)]
        for kept, theta in zip(slot.values(), snapshot, strict=True):
            local(kept).copy_(theta)
        self._total_weight = min(self.n_averaged + 1, len(self._sets))


def _add(total: Tensor, tensor: Tensor, weight: float) -> None:
    """`total += weight * tensor`, the product and the sum in float64."""
    if total.device.type != "cpu":
        total.add_(tensor, alpha=weight)  # one kernel casts and adds
        return
    # torch's loop over two dtypes takes 1.5 times as long on a CPU as casting what fits into its cache
    total, tensor = torch.atleast_1d(total), torch.atleast_1d(tensor)
    rows = max(1, _CHUNK // max(1, math.prod(total.shape[1:])))
    for part, more in zip(total.split(rows), tensor.split(rows), strict=True):
        part.add_(more.double(), alpha=weight)
