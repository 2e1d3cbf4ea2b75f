"""One pass over videos for all protocols and all weights: each video is decoded once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn
from torch.func import functional_call

from applications.openvclip import distributed
from applications.openvclip.data.decode import VideoReadError
from applications.openvclip.data.storage import Cache
from applications.openvclip.data.transforms import Normalisation, normalised
from applications.openvclip.data.views import EvaluationViews
from applications.openvclip.data.workers import Workers
from applications.openvclip.model.precision import Precision
from applications.openvclip.zeroshot.logits import LogitFiles
from applications.openvclip.zeroshot.passes import Pass
from interpolate.weights import Weights

Scorer = Callable[[Tensor, Tensor], Tensor]
"""Clips (B, 3, T, H, W) and class embeddings (K, E) → logits (B, K)."""


def at_weights(model: nn.Module, weights: Weights) -> Scorer:
    """The model's scores with other weights, by name; the model itself is not touched."""
    return lambda clips, class_embeddings: functional_call(model, dict(weights), (clips, class_embeddings))


@dataclass(frozen=True)
class Reading:
    """How videos are read."""

    size: int
    """Height and width of frames, in pixels."""
    normalisation: Normalisation
    workers: int
    time_limit_s: float
    """Seconds that one video may take."""
    batch_size: int
    """Videos at a time."""
    cache: Cache


@torch.inference_mode()
def look(
    one: Pass,
    scorers: Mapping[str, Scorer],
    class_embeddings: Tensor,
    reading: Reading,
    folder: Path,
    *,
    precision: Precision,
    weights: str,
    advance: Callable[[int], object] = lambda n: None,
) -> LogitFiles:
    """Score the videos of a pass that have no logits yet; torchrun's processes share them.

    Args:
        one: The pass.
        scorers: What to evaluate, by name.
        class_embeddings: (K, E): those of the pass's classes.
        reading: How videos are read.
        folder: Where the logits are kept; the same pass there is continued.
        precision: In which numbers to score.
        weights: A fingerprint of what the scorers compute with, to tell passes apart.
        advance: Told how many more videos have been read, by all processes as far as the files tell.

    Returns:
        The logits, complete when all processes have returned. A view's logits are kept apart from the others'.

    Raises:
        FloatingPointError: A score is not finite.
    """
    views = one.sampling.views * one.sampling.crops
    content = {
        "weights": weights,
        "templates": list(one.templates),
        "sampling": one.sampling.as_dict(),
        "size": reading.size,
        "precision": precision.name,
        "scorers": list(scorers),
        "views": views,
        "classes": list(one.classes),
        "videos": list(one.videos),
    }
    files = LogitFiles(folder, content)
    if distributed.rank() == 0:
        files.prepare()
    distributed.barrier()
    done = files.done()
    distributed.barrier()  # nobody writes before everybody has read what is left
    left = [i for i in range(len(one.videos)) if i not in done][distributed.rank() :: distributed.world_size()]
    counted = len(done)
    advance(counted)
    with Workers(
        EvaluationViews(one.sampling, reading.size, reading.cache), reading.workers, reading.time_limit_s
    ) as pool:
        values = pool.map(one.videos[i] for i in left)
        for first in range(0, len(left), reading.batch_size):
            chunk = left[first : first + reading.batch_size]
            read: dict[int, np.ndarray] = {}
            for i in chunk:
                value = next(values)
                advance(1)
                if isinstance(value, VideoReadError):
                    files.append_fault(distributed.rank(), "unreadable", i, str(value))
                    continue
                read[i], shortfall = value
                if shortfall:
                    files.append_fault(distributed.rank(), "cut-off", i, shortfall)
            if read:
                clips = torch.from_numpy(np.stack(list(read.values()))).to(class_embeddings.device)
                clips = normalised(clips, reading.normalisation)
                with precision.autocast():
                    logits = _score(scorers, clips, class_embeddings)
                files.append(distributed.rank(), list(read), logits)
            found = files.count()
            advance(found - counted - len(chunk))  # what the others have done meanwhile
            counted = found
    distributed.barrier()
    advance(len(one.videos) - counted)
    return files


def _score(scorers: Mapping[str, Scorer], views: Tensor, class_embeddings: Tensor) -> np.ndarray:
    """Views (B, V, 3, T, H, W) → logits (B, scorers, V, K) float32."""
    clips = rearrange(views, "b v c t h w -> (b v) c t h w")
    logits = []
    for name, scorer in scorers.items():
        scores = scorer(clips, class_embeddings).float()
        if not scores.isfinite().all():
            raise FloatingPointError(f"the scores of {name} are not finite; look for nan or inf in its weights.")
        logits.append(rearrange(scores, "(b v) k -> b v k", v=views.shape[1]).cpu())
    return torch.stack(logits, dim=1).numpy()
