"""From decoded frames to the tensor that the encoder takes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from applications.openvclip.data.augmentation import Augmentation


@dataclass(frozen=True)
class Normalisation:
    """Mean and standard deviation of the channels, for values in [0, 1]."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


def training_clip(frames: np.ndarray, *, size: int, augmentation: Augmentation, rng: np.random.Generator) -> Tensor:
    """A randomly cropped, mirrored and coloured clip: (T, H, W, 3) uint8 → (3, T, size, size) uint8."""
    clip = torch.from_numpy(frames).permute(0, 3, 1, 2)
    top, left = (int(rng.integers(side - size + 1)) for side in clip.shape[-2:])
    clip = TF.crop(clip, top, left, size, size)
    if augmentation.horizontal_flip and rng.random() < 0.5:
        clip = TF.horizontal_flip(clip)
    if augmentation.colour_jitter:
        brightness, contrast, saturation = rng.uniform(-1, 1, 3) * augmentation.colour_jitter + 1
        clip = TF.adjust_brightness(clip, brightness)
        clip = TF.adjust_contrast(clip, contrast)
        clip = TF.adjust_saturation(clip, saturation)
    return clip.transpose(0, 1).contiguous()


def evaluation_crops(frames: np.ndarray, *, size: int, crops: int) -> Tensor:
    """The centre, or the first, centre and last crop of the longer side: (T, H, W, 3) → (crops, 3, T, size, size)."""
    clip = torch.from_numpy(frames).permute(3, 0, 1, 2)
    slack = [side - size for side in clip.shape[-2:]]
    offsets = [0.5] if crops == 1 else [0.0, 0.5, 1.0]
    cut = []
    for offset in offsets:
        top, left = (math.ceil(s * (offset if s == max(slack) else 0.5)) for s in slack)
        cut.append(clip[..., top : top + size, left : left + size])
    return torch.stack(cut)


def normalised(clips: Tensor, normalisation: Normalisation) -> Tensor:
    """(…, 3, T, H, W) uint8 → the same in float32, with the mean and deviation that the model expects."""
    mean, std = (torch.tensor(v, device=clips.device).view(3, 1, 1, 1) for v in (normalisation.mean, normalisation.std))
    return (clips.float() / 255).sub_(mean).div_(std)
