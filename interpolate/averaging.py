"""Averages of the weights along the trajectory of training: by a kernel, equal weights, exponential, the latest few."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from interpolate._averager import WeightAverager, in_parts
from interpolate._sharding import local
from interpolate.kernels import EMA, OfRun, RunningKernel, Uniform
from interpolate.weights import whole

_HEAVIEST = 2.0**60
"""Total weight at which a sum is scaled down, far from where float64 would overflow."""


class KernelAverager(WeightAverager):
    """The average with the weights of a kernel, which it follows snapshot by snapshot in the memory of one sum.

    Args:
        kernel: From `interpolate.kernels`; one that stretches with the run, with its number of snapshots:
            `Beta(0.5, 0.5).over(22)`. Snapshots are counted from 1, the anchor too if the average starts there.
        schedule: As for `WeightAverager`.

    Example:
        >>> import torch
        >>> from interpolate.kernels import Power
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> averager = KernelAverager(model, Power(1))
        >>> for value in (0.0, 1.0):
        ...     _ = torch.nn.init.constant_(model.weight, value)
        ...     averager.update()
        >>> averager.weights
        {'weight': tensor([[0.7500]])}
    """

    def __init__(self, model: nn.Module, kernel: RunningKernel, **schedule: Any) -> None:
        if isinstance(kernel, OfRun):
            raise ValueError(
                f"{kernel} depends on how many snapshots there will be; say so: {kernel}.over(22) for 22 of them."
            )
        if not isinstance(kernel, RunningKernel):
            raise ValueError(f"kernel must be one of interpolate.kernels, such as Uniform(), got {kernel!r}.")
        self.kernel = kernel
        super().__init__(model, **schedule)

    def _absorb(self, snapshot: list[Tensor]) -> None:
        weight = self.kernel.weight(self.n_averaged + 1, self._total_weight) if self.n_averaged else 1.0
        sums = [local(total) for total in self._sets[0].values()]
        if self._total_weight + weight > _HEAVIEST:
            scale = 2.0 ** -math.frexp(self._total_weight + weight)[1]  # a power of two: exact
            torch._foreach_mul_(sums, scale)
            self._total_weight *= scale
            weight *= scale
        for total, theta in zip(sums, snapshot, strict=True):
            _add(total, theta.to(total.device), weight)
        self._total_weight += weight

    def _kind(self) -> str:
        return f"KernelAverager({self.kernel})"


class SWAAverager(KernelAverager):
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

    def __init__(self, model: nn.Module, **schedule: Any) -> None:
        super().__init__(model, Uniform(), **schedule)


class EMAAverager(KernelAverager):
    """Exponential moving average: `theta_ema = d * theta_ema + (1 - d) * theta`; the first snapshot starts it.

    With `warmup`, `d = min(decay, (1 + n) / (10 + n))` after n snapshots, so that early weights are soon forgotten; do
    without it where the average is to remember the anchor that it starts at.

    Source: Polyak & Juditsky 1992; the warm-up is that of TensorFlow's `ExponentialMovingAverage(num_updates)`.

    Args:
        decay: The weight of the average, in [0, 1); that of theta is `1 - decay`, and the average reaches about
            `1 / (1 - decay)` snapshots back.
        warmup: Whether the decay begins lower.
        schedule: As for `WeightAverager`.

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
        super().__init__(model, EMA(decay, warmup), **schedule)


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
        self._n_sets = whole("k", k, at_least=1)
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
    for part, more in in_parts(total, tensor):
        part.add_(more.double(), alpha=weight)
