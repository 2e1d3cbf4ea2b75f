"""From the bytes of clips to the numbers that the encoder takes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Normalisation:
    """Mean and standard deviation of the channels, for values in [0, 1]."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


def normalised(clips: Tensor, normalisation: Normalisation) -> Tensor:
    """(…, 3, T, H, W) uint8 → the same in float32, with the mean and deviation that the model expects."""
    mean, std = (torch.tensor(v, device=clips.device).view(3, 1, 1, 1) for v in (normalisation.mean, normalisation.std))
    return (clips.float() / 255).sub_(mean).div_(std)
