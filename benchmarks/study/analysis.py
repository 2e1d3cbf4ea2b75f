"""What the runs of the study say: pure functions on accuracies.

Methods are compared at equal closed-set accuracy, because a fixed anchor weight lets a method that merely slides along
the curve look like one that lifts it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
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


def front(curve: Curve) -> list[tuple[float, float]]:
    """The most of the other accuracy that is to be had with at least so much closed accuracy: the useful branch, with
    its rising part raised to its peak."""
    best, found = float("-inf"), []
    for closed, other in reversed(useful_branch(curve)):
        best = max(best, other)
        found.append((closed, best))
    return found[::-1]


def overlap(a: Curve, b: Curve) -> tuple[float, float] | None:
    """The closed accuracies that two curves both reach, from the least to the most; None where there are none.

    The chord from the anchor, where both begin, to the next point says nothing of either: what both reach begins at
    that point.
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


T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""Of Student's t with 1, 2, … degrees of freedom: 2.5 % lie above."""


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds, and the 95 % interval of it by Student's t; one seed has no interval but the mean."""

    mean: float
    std: float
    low: float
    high: float
    n: int


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of one value a seed, its spread, and the interval of the mean.

    Not a bootstrap of the seeds: of five values that are drawn around 0 its interval leaves 0 out 15 times in a
    hundred, of three 26 times. With more than eleven seeds the interval is a little too wide.
    """
    if not values:
        raise ValueError("there is nothing to estimate: no seed has a value.")
    n, mean = len(values), fmean(values)
    if n == 1:
        return Estimate(mean, 0.0, mean, mean, n)
    std = stdev(values)
    half = T_975[min(n - 2, len(T_975) - 1)] * std / n**0.5
    return Estimate(mean, std, mean - half, mean + half, n)


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
