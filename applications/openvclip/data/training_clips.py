"""Training clips of the videos of a manifest: what a reading process does for a key."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from applications.openvclip.data.augmentation import Augmentation
from applications.openvclip.data.manifest import Manifest
from applications.openvclip.data.sampling import Sampling
from applications.openvclip.data.storage import Cache
from applications.openvclip.data.views import chosen_frames

TrainingKey = tuple[int, int, int]
"""Epoch, index in the manifest, and how many other videos have been tried for it."""


@dataclass(frozen=True)
class TrainingClips:
    """Augmented clips. A clip is a function of the seed, the epoch and the index alone, whoever asks for it, and when.

    A key (epoch, i, 0) is video i; where it can't be read, (epoch, i, 1) is the first video to take its place, and so
    on. Values are a clip (3, T, size, size) uint8, the index of its class, and the shortfall of a video that was cut
    off.
    """

    manifest: Manifest
    sampling: Sampling
    size: int
    augmentation: Augmentation
    seed: int
    cache: Cache

    def video(self, key: TrainingKey) -> int:
        """The index in the manifest of the video that a key stands for."""
        epoch, i, attempt = key
        if attempt == 0:
            return i
        return int(np.random.default_rng([self.seed, epoch, i, attempt]).integers(len(self.manifest)))

    def __call__(self, key: TrainingKey) -> tuple[np.ndarray, int, str]:
        i = self.video(key)
        rng = np.random.default_rng([self.seed, key[0], i])
        short_side = self.augmentation.short_side(self.size, rng)
        frames, shortfall = chosen_frames(
            self.manifest.location(i),
            self.cache,
            short_side,
            lambda n, fps: self.sampling.training_clip(n, fps, rng).tolist(),
        )
        clip = training_clip(frames, size=self.size, augmentation=self.augmentation, rng=rng)
        return clip.numpy(), self.manifest.labels[i], shortfall


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
