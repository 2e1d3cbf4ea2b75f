"""Averaging kernels: how much each of the snapshots along a training weighs in their average.

A kernel gives the weights of n snapshots, the oldest first: `kernel.weights(n)`, float64, which add up to 1. With most
kernels the ratio of two weights does not depend on how many snapshots follow; these have a running form, which an
averager follows in the memory of one sum. The others (`OfRun`) stretch with the run, and have one as soon as its length
is known: `kernel.over(total)`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

_STEEPEST = 600.0
"""The largest logarithm of a ratio between neighbours: more is the same in float64, and would overflow."""


class Kernel(ABC):
    """How much each of n snapshots weighs in their average."""

    @abstractmethod
    def weights(self, n: int) -> Tensor:
        """The weights of n snapshots, the oldest first: float64, not negative, with the sum 1."""


class RunningKernel(Kernel):
    """A kernel whose ratios of weights do not depend on the number of snapshots: an averager can follow it."""

    @abstractmethod
    def _logarithms(self, n: int) -> Tensor:
        """The logarithms of the first n weights, up to a constant; those of fewer are the first of these."""

    def weights(self, n: int) -> Tensor:
        return self._logarithms(_counted(n)).softmax(0)

    def weight(self, n: int, before: float) -> float:
        """The weight of snapshot n, from 2, where those before it weigh `before` together."""
        logarithms = self._logarithms(n)
        return before * math.exp(min(float(logarithms[-1] - logarithms[:-1].logsumexp(0)), _STEEPEST))


class OfRun(Kernel):
    """A kernel that stretches with the run: its weights depend on where a snapshot stands among all of them."""

    @abstractmethod
    def over(self, total: int) -> RunningKernel:
        """The kernel of a run whose number of snapshots is known, for an averager to follow."""

    def weights(self, n: int) -> Tensor:
        return self.over(n).weights(n)


@dataclass(frozen=True)
class Uniform(RunningKernel):
    """Equal weights: stochastic weight averaging, model soups.

    Example:
        >>> Uniform().weights(4)
        tensor([0.2500, 0.2500, 0.2500, 0.2500], dtype=torch.float64)
    """

    def _logarithms(self, n: int) -> Tensor:
        return torch.zeros(n, dtype=torch.float64)

    def weights(self, n: int) -> Tensor:
        return torch.full((_counted(n),), 1 / n, dtype=torch.float64)

    def weight(self, n: int, before: float) -> float:
        return before / (n - 1)


@dataclass(frozen=True)
class EMA(RunningKernel):
    """Exponential moving average: `average = d * average + (1 - d) * snapshot`; the first snapshot starts it.

    So the first weighs `d ** (n - 1)`, more than the second while the average is young: an average that begins at the
    anchor long remembers it. `Exponential` has no such memory.

    Args:
        decay: The weight d of what has been averaged before, in [0, 1).
        warmup: Whether `d = min(decay, n / (9 + n))` for snapshot n, so that early ones are soon forgotten.

    Example:
        >>> EMA(0.5).weights(3)
        tensor([0.2500, 0.2500, 0.5000], dtype=torch.float64)
    """

    decay: float
    warmup: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {self.decay}.")

    def _logarithms(self, n: int) -> Tensor:
        decays = torch.tensor([self._decay(i) for i in range(2, n + 1)], dtype=torch.float64)
        later = (1 - decays).log() - decays.log().cumsum(0)
        return torch.cat([torch.zeros(1, dtype=torch.float64), later])

    def weight(self, n: int, before: float) -> float:
        decay = self._decay(n)
        return before * (1 - decay) / decay

    def _decay(self, n: int) -> float:
        decay = min(self.decay, n / (9 + n)) if self.warmup else self.decay
        return max(decay, 2.0**-900)  # 0 too: what is left of earlier snapshots is below the least float32


@dataclass(frozen=True)
class Exponential(RunningKernel):
    """Weights that double every `half_life` snapshots, the first like all others.

    Args:
        half_life: Number of snapshots, positive.

    Example:
        >>> Exponential(1).weights(3)
        tensor([0.1429, 0.2857, 0.5714], dtype=torch.float64)
    """

    half_life: float

    def __post_init__(self) -> None:
        _check_positive("half_life", self.half_life)

    @property
    def _rate(self) -> float:
        return min(math.log(2) / self.half_life, _STEEPEST)

    def _logarithms(self, n: int) -> Tensor:
        return _numbers(n) * self._rate

    def weight(self, n: int, before: float) -> float:
        return before * math.expm1(self._rate) / -math.expm1(-self._rate * (n - 1))


@dataclass(frozen=True)
class ExponentialOfRun(OfRun):
    """`Exponential` with a half-life that is a fraction of the run.

    Args:
        half_life: Fraction of the number of snapshots, positive.

    Example:
        >>> ExponentialOfRun(0.25).weights(4)
        tensor([0.0667, 0.1333, 0.2667, 0.5333], dtype=torch.float64)
    """

    half_life: float

    def __post_init__(self) -> None:
        _check_positive("half_life", self.half_life)

    def over(self, total: int) -> Exponential:
        return Exponential(self.half_life * _counted(total))


@dataclass(frozen=True)
class Power(RunningKernel):
    """Weights like `t ** exponent`, t being the time since the beginning: an average as long as the run, always.

    Snapshot i stands for the time from i - 1 to i. An exponent of 0 is `Uniform`; positive ones prefer the end.
    -0.5 does for a constant learning rate what decaying it by 1 - sqrt would have done (and an exponent p - 1 what
    1 - t ** p would have): the average of the weights is where decayed steps would have led.

    Source: Karras et al. 2024, EDM2 (arXiv 2312.02696); for the decays, Tian et al. 2025, WSM (arXiv 2507.17634).

    Args:
        exponent: Above -1, EDM2's gamma.

    Example:
        >>> Power(1).weights(2)
        tensor([0.2500, 0.7500], dtype=torch.float64)
    """

    exponent: float

    def __post_init__(self) -> None:
        if not -1 < self.exponent < math.inf:
            raise ValueError(f"exponent must be above -1 and finite, got {self.exponent}.")

    @classmethod
    def of_width(cls, width: float) -> Power:
        """The kernel of a width, EDM2's sigma_rel: its standard deviation as a fraction of the run, such as 0.1.

        Example:
            >>> round(Power.of_width(0.1).exponent, 2)
            6.94
        """
        widest = 12**-0.5
        if not 0 < width <= widest:
            raise ValueError(f"width must be above 0 and at most {widest:.4f}, that of equal weights; got {width}.")
        low, high = 0.0, 1 / width  # the width falls with the exponent
        while (middle := (low + high) / 2) not in (low, high):
            if (middle + 1) / ((middle + 2) ** 2 * (middle + 3)) > width**2:
                low = middle
            else:
                high = middle
        return cls(low)

    def _logarithms(self, n: int) -> Tensor:
        i, p = _numbers(n), self.exponent + 1
        return p * i.log() + (-torch.expm1(p * torch.log1p(-1 / i))).log()

    def weight(self, n: int, before: float) -> float:
        return before * math.expm1(min(-(self.exponent + 1) * math.log1p(-1 / n), _STEEPEST))


@dataclass(frozen=True)
class Gaussian(RunningKernel):
    """A Gaussian over the numbers of the snapshots, which are counted from 1.

    Source: Yu et al. 2025, Open-MeDe (arXiv 2502.20158), over epochs.

    Args:
        mean: Number of the snapshot that weighs most, such as that of an epoch.
        std: Standard deviation in snapshots, positive.

    Example:
        >>> Gaussian(2, 1).weights(3)
        tensor([0.2741, 0.4519, 0.2741], dtype=torch.float64)
    """

    mean: float
    std: float

    def __post_init__(self) -> None:
        if not math.isfinite(self.mean):
            raise ValueError(f"mean must be finite, got {self.mean}.")
        _check_positive("std", self.std)

    def _logarithms(self, n: int) -> Tensor:
        return -((_numbers(n) - self.mean) / self.std).square() / 2


@dataclass(frozen=True)
class Beta(OfRun):
    """The density of a Beta distribution over the run; (0.5, 0.5) remembers its beginning and its end.

    Snapshot i of n stands at (i - 0.5) / n.

    Source: Shu et al. 2023, CLIPood (arXiv 2302.00864); Asadollahzadeh et al. 2026, TRACER (arXiv 2605.29380). In both
    the first snapshot is the anchor.

    Args:
        a: Positive; below 1, the beginning is heavy.
        b: Positive; below 1, the end is heavy.

    Example:
        >>> Beta(0.5, 0.5).weights(3)
        tensor([0.3643, 0.2715, 0.3643], dtype=torch.float64)
    """

    a: float
    b: float

    def __post_init__(self) -> None:
        _check_positive("a", self.a)
        _check_positive("b", self.b)

    def over(self, total: int) -> RunningKernel:
        return _BetaOver(self.a, self.b, _counted(total))


@dataclass(frozen=True)
class _BetaOver(RunningKernel):
    a: float
    b: float
    total: int

    def _logarithms(self, n: int) -> Tensor:
        if n > self.total:
            raise ValueError(
                f"snapshot {n} of a run of {self.total}: its weight is not defined. Give Beta(...).over the number of "
                "snapshots that there will be."
            )
        x = (_numbers(n) - 0.5) / self.total
        return (self.a - 1) * x.log() + (self.b - 1) * torch.log1p(-x)


def parse_kernel(text: str) -> Kernel:
    """A kernel from its short name, as command lines and configurations have it.

    `uniform`; `exponential:20`, a half-life in snapshots, or `exponential:5%` of the run; `ema:0.99`, a decay;
    `power:0.1`, EDM2's relative width; `1-sqrt`; `gaussian:15,10`, mean and standard deviation in snapshots;
    `beta:0.5,0.5`.

    Raises:
        ValueError: The text is none of these.

    Example:
        >>> parse_kernel("exponential:5%")
        ExponentialOfRun(half_life=0.05)
    """
    name, _, given = text.partition(":")
    percent = name == "exponential" and given.endswith("%")
    made = {
        ("uniform", 0): Uniform,
        ("1-sqrt", 0): lambda: Power(-0.5),
        ("exponential", 1): (lambda percents: ExponentialOfRun(percents / 100)) if percent else Exponential,
        ("ema", 1): EMA,
        ("power", 1): Power.of_width,
        ("gaussian", 2): Gaussian,
        ("beta", 2): Beta,
    }
    try:
        numbers = [float(number) for number in given.removesuffix("%" if percent else "").split(",")] if given else []
        make = made[name, len(numbers)]
    except (ValueError, KeyError):
        raise ValueError(
            f"{text!r} is no averaging kernel. There are uniform, exponential:20 (half-life in snapshots), "
            "exponential:5% (of the run), ema:0.99 (decay), power:0.1 (relative width), 1-sqrt, gaussian:15,10 (mean "
            "and standard deviation in snapshots) and beta:0.5,0.5."
        ) from None
    return make(*numbers)


def _numbers(n: int) -> Tensor:
    return torch.arange(1, n + 1, dtype=torch.float64)


def _counted(n: int) -> int:
    if n < 1:
        raise ValueError(f"the number of snapshots must be at least 1, got {n}.")
    return n


def _check_positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value}.")
