"""What the runs of the study say: pure functions on accuracies.

Methods are compared at equal closed-set accuracy, because a fixed anchor weight lets a method that merely slides along
the curve look like one that lifts it.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Curve = Sequence[tuple[float, float]]
"""(closed, other) accuracy by falling anchor weight: from the anchor on to the fine-tuned weights."""
Verdict = Literal["held", "not held", "within noise", "one seed", "cannot be compared"]


def useful_branch(curve: Curve) -> list[tuple[float, float]]:
    """The part of a curve that one would choose from: from the anchor on, the points with more closed accuracy than all
    before. Beyond its best closed accuracy a curve bends back, and there is more of both on the way there."""
    branch: list[tuple[float, float]] = []
    for point in curve:
        if not branch or point[0] > branch[-1][0]:
            branch.append(point)
    return branch


def overlap(a: Curve, b: Curve) -> tuple[float, float] | None:
    """The closed accuracies that two curves both reach, from the least to the most; None where there are none.

    The anchor is the same in both, and the chord from it to the next point says nothing of either: what both reach
    begins at that point.
    """
    branches = [useful_branch(curve)[1:] for curve in (a, b)]
    if not all(branches):
        return None
    low, high = max(branch[0][0] for branch in branches), min(branch[-1][0] for branch in branches)
    return (low, high) if low < high else None


def gap(better: Curve, worse: Curve) -> float | None:
    """How much higher one curve lies than another: the mean over their `overlap`.

    Between points the curves are lines, of which the mean is exact.

    Returns:
        None where there is no closed accuracy that both reach.
    """
    both = overlap(better, worse)
    if both is None:
        return None
    low, high = both
    branches = [useful_branch(curve)[1:] for curve in (better, worse)]
    x = sorted({low, high, *(closed for branch in branches for closed, _ in branch if low < closed < high)})
    upper, lower = (np.interp(x, [p[0] for p in branch], [p[1] for p in branch]) for branch in branches)
    return float(np.trapezoid(upper - lower, x)) / (high - low)


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds, and the middle 95 % of its bootstrap."""

    mean: float
    std: float
    low: float
    high: float
    n: int


def estimate(values: Sequence[float], level: float = 0.95) -> Estimate:
    """The mean of one value a seed, its spread, and a bootstrap interval of the mean.

    With few seeds every resample is enumerated and the interval exact; with more there are 20,000 seeded ones. With two
    seeds it is their range. The interval of a handful of seeds is somewhat too narrow, and the report says so.
    """
    if not values:
        raise ValueError("there is nothing to estimate: no seed has a value.")
    n, array = len(values), np.asarray(values, dtype=float)
    if n <= 6:
        chosen = np.array(list(itertools.product(range(n), repeat=n)))
    else:
        chosen = np.random.default_rng(0).integers(n, size=(20_000, n))
    tail = (1 - level) / 2
    means = array[chosen].mean(axis=1)
    low, high = np.quantile(means, tail, method="lower"), np.quantile(means, 1 - tail, method="higher")
    return Estimate(float(array.mean()), float(array.std(ddof=1)) if n > 1 else 0.0, float(low), float(high), n)


def verdict(difference: Estimate | None) -> Verdict:
    """Whether a difference is there: an interval above 0, below it, or around it. One seed has no interval."""
    if difference is None:
        return "cannot be compared"
    if difference.n == 1:
        return "one seed"
    if difference.low > 0:
        return "held"
    if difference.high < 0:
        return "not held"
    return "within noise"


def paired(a: Mapping[int, float], b: Mapping[int, float]) -> Estimate | None:
    """The difference of two methods over the seeds that both have."""
    common = sorted(a.keys() & b.keys())
    return estimate([a[seed] - b[seed] for seed in common]) if common else None


def gaps(better: Mapping[int, Curve], worse: Mapping[int, Curve]) -> Estimate | None:
    """`gap` over the seeds that both methods have; None unless the curves of every one of them can be compared."""
    found = [gap(better[seed], worse[seed]) for seed in sorted(better.keys() & worse.keys())]
    there = [value for value in found if value is not None]
    return estimate(there) if there and len(there) == len(found) else None
