"""How sure answers are and may be: calibration, and telling videos of the label set from others. Pure functions."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_LARGEST = 1e3
"""Of what logits are divided by or multiplied with: beyond it the fit has no end."""


def fitted_temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature whose probabilities, softmax(logits / temperature), have the highest likelihood.

    Source: Guo et al. 2017 (arXiv 1706.04599). The likelihood is concave in the inverse, whose derivative is bisected.

    Args:
        logits: (N, K) of held-out videos.
        labels: (N,), the class of each.

    Raises:
        ValueError: No temperature is the best: all answers are right, or they are worse than chance.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0]] * 4)
        >>> round(fitted_temperature(logits, torch.tensor([0, 0, 0, 1])), 3)  # right in 3 of 4: log 3 is sure enough
        1.82
    """
    logits = logits.double()
    own = logits.gather(1, labels.unsqueeze(1)).squeeze(1).mean()

    def slope(inverse: float) -> float:
        return float(own - ((logits * inverse).softmax(dim=1) * logits).sum(dim=1).mean())

    low, high = 1 / _LARGEST, _LARGEST
    if not slope(low) > 0 > slope(high):
        right = float((logits.argmax(dim=1) == labels).double().mean())
        raise ValueError(
            f"{len(labels)} videos with {100 * right:.1f} % right answers fit no temperature: it takes some wrong "
            "answers, and right ones above chance. Calibrate on more videos, or on harder ones."
        )
    for _ in range(100):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if slope(middle) > 0 else (low, middle)
    return 1 / low


def calibration_error(confidence: np.ndarray, correct: np.ndarray, bins: int = 15) -> float:
    """Expected calibration error: how far confidence and accuracy are apart, over bins of equal width.

    Source: Naeini et al. 2015; Guo et al. 2017, eq. 3.

    Example:
        >>> calibration_error(np.array([0.9, 0.9, 0.6, 0.6]), np.array([True, True, True, False]))
        0.1
    """
    bin_of = np.minimum((confidence * bins).astype(int), bins - 1)
    shares = [np.flatnonzero(bin_of == b) for b in range(bins)]
    gaps = [abs(confidence[i].mean() - correct[i].mean()) * len(i) for i in shares if len(i)]
    return round(float(sum(gaps) / len(confidence)), 12)


def auroc(inside: np.ndarray, outside: np.ndarray) -> float:
    """The probability that a score from inside is above one from outside; a tie counts half.

    Example:
        >>> auroc(np.array([3.0, 2.0]), np.array([1.0, 2.0]))
        0.875
    """
    inside = np.sort(inside)
    below = np.searchsorted(inside, outside, side="left")
    upto = np.searchsorted(inside, outside, side="right")
    return float(1 - ((below + upto) / 2).mean() / len(inside))


def average_precision(scores: np.ndarray, shown: np.ndarray) -> float:
    """The area under precision over recall, by steps: the mean, over videos that show a class, of the precision there.

    Videos of equal scores come at once, so that their order does not matter.

    Example:
        >>> average_precision(np.array([0.9, 0.8, 0.7, 0.6]), np.array([True, False, True, False]))
        0.8333333333333333
        >>> average_precision(np.array([1.0, 1.0]), np.array([True, False]))
        0.5
    """
    ranked = np.sort(-scores)
    upto = np.searchsorted(ranked, -scores[shown], side="right")  # how many have that score or a higher one
    hits = np.searchsorted(np.sort(-scores[shown]), -scores[shown], side="right")
    return float((hits / upto).mean())


def accuracy_at_coverage(confidence: np.ndarray, correct: np.ndarray, coverage: float = 0.95) -> float:
    """Accuracy over the share of videos with the most confident answers."""
    kept = np.argsort(-confidence, kind="stable")[: max(1, round(coverage * len(confidence)))]
    return float(correct[kept].mean())


def with_and_without(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The highest logit of each video among a half of the classes that holds its own, and among the other half.

    The half is drawn by a fixed seed. The second is what a video scores whose class is none of the labels.

    Args:
        logits: (..., N, K), of at least two classes.
        labels: (N,).

    Returns:
        Two of (..., N).
    """
    classes = logits.shape[-1]
    half = torch.zeros(classes, dtype=torch.bool)
    half[np.random.default_rng(0).permutation(classes)[: classes // 2]] = True
    own = half.unsqueeze(0) == half[labels].unsqueeze(1)
    low = torch.tensor(-torch.inf, dtype=logits.dtype)
    return torch.where(own, logits, low).amax(dim=-1), torch.where(own, low, logits).amax(dim=-1)
