"""Numbers out of logits: pure functions."""

from __future__ import annotations

import torch
from torch import Tensor


def top_k_correct(logits: Tensor, labels: Tensor, k: int = 1) -> Tensor:
    """Whether each video's class is among its k highest logits; never where the logits are nan.

    Args:
        logits: (videos, classes).
        labels: (videos,) indices of classes.

    Returns:
        (videos,) bool.
    """
    top = logits.nan_to_num(nan=0.0).topk(k, dim=1).indices
    return (top == labels.unsqueeze(1)).any(dim=1) & ~logits.isnan().any(dim=1)


def top_k_accuracy(logits: Tensor, labels: Tensor, k: int = 1) -> float:
    """Share of videos whose class is among the k highest logits, in [0, 1]."""
    return top_k_correct(logits, labels, k).double().mean().item()


def per_class_accuracy(correct: Tensor, labels: Tensor, n_classes: int) -> Tensor:
    """Share of correct videos of each class: (n_classes,) float64, nan for a class without videos."""
    totals = torch.bincount(labels, minlength=n_classes)
    return torch.bincount(labels, weights=correct.double(), minlength=n_classes) / totals
