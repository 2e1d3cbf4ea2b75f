"""Videos of a manifest as training clips and as test views."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from applications.openvclip.data import transforms
from applications.openvclip.data.decode import Video
from applications.openvclip.data.manifest import Manifest
from applications.openvclip.data.sampling import dense_clip, view_starts
from applications.openvclip.data.transforms import Augmentation, Normalisation


@dataclass(frozen=True)
class ClipFormat:
    """What a clip is: how many frames, how far apart, how large."""

    frames: int
    """Frames of a clip."""
    stride: float
    """Distance of neighbouring frames of a clip, in frames at `target_fps`."""
    target_fps: float | None
    """Frame rate in which `stride` counts; None counts the video's own frames."""
    size: int
    """Height and width, in pixels."""
    normalisation: Normalisation

    def read(self, video: Video, start: float) -> np.ndarray:
        """The frames of a clip that starts at a fraction of the possible range: (T, H, W, 3) uint8."""
        stride = self.stride * (video.frames_per_second / self.target_fps if self.target_fps else 1)
        return video.frames(dense_clip(len(video), frames=self.frames, stride=stride, start=start).tolist())


@dataclass(frozen=True)
class TrainingClips(Dataset[tuple[Tensor, int]]):
    """Augmented clips. Item (epoch, i) is a function of the seed, the epoch and i alone, whoever asks for it, and when.

    Items are a clip (3, T, H, W) float32 and the index of its class.
    """

    manifest: Manifest
    format: ClipFormat
    augmentation: Augmentation
    seed: int

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        epoch, i = key
        rng = np.random.default_rng([self.seed, epoch, i])
        frames = self.format.read(Video(self.manifest.paths[i]), start=rng.random())
        clip = transforms.training_clip(
            frames,
            size=self.format.size,
            normalisation=self.format.normalisation,
            augmentation=self.augmentation,
            rng=rng,
        )
        return clip, self.manifest.labels[i]


@dataclass(frozen=True)
class EvaluationViews(Dataset[tuple[Tensor, int]]):
    """Centre-cropped clips at evenly spread places of each video.

    Items are views (V, 3, T, H, W) float32 and the index of the class.
    """

    manifest: Manifest
    format: ClipFormat
    views: int = 1

    def __len__(self) -> int:
        return len(self.manifest)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        video = Video(self.manifest.paths[i])
        clips = [
            transforms.evaluation_clip(
                self.format.read(video, start), size=self.format.size, normalisation=self.format.normalisation
            )
            for start in view_starts(self.views)
        ]
        return torch.stack(clips), self.manifest.labels[i]
