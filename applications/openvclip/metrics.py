"""Numbers out of logits: pure functions."""

from __future__ import annotations

from torch import Tensor


def top_k_accuracy(logits: Tensor, labels: Tensor, k: int = 1) -> float:
    """Share of videos whose class is among the k highest logits, in [0, 1].

    Args:
        logits: (videos, classes).
        labels: (videos,) indices of classes.
    """
    top = logits.topk(k, dim=1).indices
    return (top == labels.unsqueeze(1)).any(dim=1).double().mean().item()
