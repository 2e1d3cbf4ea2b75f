"""One pass over the videos of a set, scored by any number of models."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.func import functional_call

from interpolate.weights import Weights

Scorer = Callable[[Tensor, Tensor], Tensor]
"""Clips (B, 3, T, H, W) and class embeddings (K, E) → logits (B, K)."""


def at_weights(model: nn.Module, weights: Weights) -> Scorer:
    """The model's scores with other weights, by name; the model itself is not touched."""
    return lambda clips, class_embeddings: functional_call(model, dict(weights), (clips, class_embeddings))


@torch.inference_mode()
def score(
    scorers: Mapping[str, Scorer],
    batches: Iterable[tuple[Tensor, Tensor]],
    class_embeddings: Tensor,
    advance: Callable[[int], object] = lambda n: None,
) -> tuple[dict[str, Tensor], Tensor]:
    """Logits of every video by every scorer; each video is decoded once.

    Args:
        scorers: What to evaluate, by name.
        batches: Views (B, V, 3, T, H, W) and labels (B,).
        class_embeddings: (K, E): the label set.
        advance: Told how many videos are done after each batch.

    Returns:
        For each scorer (videos, K) float32, the sum over views of a video; and the labels (videos,).
    """
    logits: dict[str, list[Tensor]] = {name: [] for name in scorers}
    labels = []
    for views, label in batches:
        clips = rearrange(views.to(class_embeddings.device), "b v c t h w -> (b v) c t h w")
        for name, scorer in scorers.items():
            scores = scorer(clips, class_embeddings).float()
            logits[name].append(rearrange(scores, "(b v) k -> b v k", v=views.shape[1]).sum(dim=1).cpu())
        labels.append(label)
        advance(len(label))
    return {name: torch.cat(parts) for name, parts in logits.items()}, torch.cat(labels)
