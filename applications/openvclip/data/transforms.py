"""From decoded frames to the tensor that the encoder takes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as TF


@dataclass(frozen=True)
class Augmentation:
    """Random changes to a training clip, the same for all its frames. The defaults change nothing."""

    max_short_side: float = 1.0
    """The short side is drawn between the crop's side and this many times it; published: 256 / 224."""
    horizontal_flip: bool = False
    """Whether half of the clips are mirrored."""
    colour_jitter: float = 0.0
    """Brightness, contrast and saturation are multiplied by factors drawn from 1 - this to 1 + this."""


@dataclass(frozen=True)
class Normalisation:
    """Mean and standard deviation of the channels, for values in [0, 1]."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


def training_clip(
    frames: np.ndarray, *, size: int, normalisation: Normalisation, augmentation: Augmentation, rng: np.random.Generator
) -> Tensor:
    """A randomly resized, cropped, mirrored and coloured clip: (T, H, W, 3) uint8 → (3, T, size, size) float32."""
    clip = resized(frames, round(size * rng.uniform(1.0, augmentation.max_short_side)))
    top, left = (int(rng.integers(side - size + 1)) for side in clip.shape[-2:])
    clip = TF.crop(clip, top, left, size, size)
    if augmentation.horizontal_flip and rng.random() < 0.5:
        clip = TF.horizontal_flip(clip)
    if augmentation.colour_jitter:
        brightness, contrast, saturation = rng.uniform(-1, 1, 3) * augmentation.colour_jitter + 1
        clip = TF.adjust_brightness(clip, brightness)
        clip = TF.adjust_contrast(clip, contrast)
        clip = TF.adjust_saturation(clip, saturation)
    return normalised(clip, normalisation)


def evaluation_clip(frames: np.ndarray, *, size: int, normalisation: Normalisation) -> Tensor:
    """The clip at a short side of `size`, centre crop: (T, H, W, 3) uint8 → (3, T, size, size) float32."""
    return normalised(TF.center_crop(resized(frames, size), [size, size]), normalisation)


def resized(frames: np.ndarray, short_side: int) -> Tensor:
    """(T, H, W, 3) uint8 → (T, 3, H', W') uint8 with a short side of `short_side` pixels."""
    clip = torch.from_numpy(frames).permute(0, 3, 1, 2)
    return TF.resize(clip, [short_side], interpolation=InterpolationMode.BICUBIC, antialias=True)


def normalised(clip: Tensor, normalisation: Normalisation) -> Tensor:
    """(T, 3, H, W) uint8 → (3, T, H, W) float32 of zero mean and unit variance."""
    clip = TF.normalize(TF.to_dtype(clip, torch.float32, scale=True), list(normalisation.mean), list(normalisation.std))
    return clip.transpose(0, 1).contiguous()
