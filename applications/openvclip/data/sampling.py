"""Which frames of a video make a clip: pure functions of its length and frame rate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from math import inf
from typing import Literal

import numpy as np

SamplerName = Literal["dense", "slowfast-offset", "slowfast-uniform", "segment"]


@dataclass(frozen=True)
class Sampling:
    """What the clips of a video are."""

    frames: int = 8
    """Frames of a clip."""
    stride: float = 16
    """Distance of neighbouring frames of a clip, in frames at `target_fps`."""
    target_fps: float | None = 30
    """Frame rate in which `stride` counts; None counts the video's own frames."""
    sampler: SamplerName = "slowfast-offset"
    """How a clip's frames are placed. "slowfast-offset" and "slowfast-uniform" are those of the published code, with
    its USE_OFFSET_SAMPLING (which the published runs use) and without; "dense" keeps `stride` exactly and spreads
    views from the first to the last place; "segment" takes a frame of each of as many equal segments, whatever
    `stride`."""
    views: int = 3
    """Test clips of a video along time, whose scores are added."""
    crops: int = 1
    """Test crops of each of them along the longer side: 1 (centre) or 3."""

    def __post_init__(self) -> None:
        if self.frames < 1 or self.views < 1 or not 0 < self.stride < inf:
            raise ValueError(
                f"frames, views and stride must be positive and finite, got {self.frames}, {self.views} and "
                f"{self.stride}."
            )
        if self.target_fps is not None and not 0 < self.target_fps < inf:
            raise ValueError(f"target_fps must be positive and finite, got {self.target_fps}.")
        if self.crops not in (1, 3):
            raise ValueError(f"crops must be 1 or 3, got {self.crops}.")
        if self.sampler not in SAMPLERS:
            raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}, got {self.sampler!r}.")

    def as_dict(self) -> dict[str, float | str | None]:
        """Plain values, to tell one sampling from another: 16 and 16.0 are the same stride."""
        return {k: float(v) if isinstance(v, int) else v for k, v in asdict(self).items()}

    def training_clip(self, n_frames: int, frames_per_second: float, rng: np.random.Generator) -> np.ndarray:
        """Indices of a clip at a random place: (frames,) int64, ascending, in [0, n_frames)."""
        return SAMPLERS[self.sampler][0](n_frames, self.frames, self._stride(frames_per_second), rng)

    def test_clip(self, n_frames: int, frames_per_second: float, view: int) -> np.ndarray:
        """Indices of the clip of a view, counted from 0: (frames,) int64, ascending, in [0, n_frames)."""
        return SAMPLERS[self.sampler][1](n_frames, self.frames, self._stride(frames_per_second), view, self.views)

    def _stride(self, frames_per_second: float) -> float:
        return self.stride * (frames_per_second / self.target_fps if self.target_fps else 1)


def dense_clip(n_frames: int, *, frames: int, stride: float, start: float) -> np.ndarray:
    """Indices of a clip of `frames` frames, `stride` apart; a video that is too short is padded by its last frame.

    Args:
        n_frames: Length of the video, at least 1.
        frames: Length of the clip.
        stride: Distance of neighbouring frames of the clip, in frames of the video; need not be whole.
        start: Where the clip starts within the range that leaves it inside the video: 0 is the earliest place, 1 the
            latest.

    Returns:
        (frames,) int64, ascending, in [0, n_frames).

    Raises:
        ValueError: An argument is out of its range.

    Example:
        >>> dense_clip(16, frames=4, stride=4, start=0.5).tolist()
        [1, 5, 9, 13]
        >>> dense_clip(2, frames=4, stride=1, start=0).tolist()
        [0, 1, 1, 1]
    """
    if n_frames < 1 or frames < 1 or not stride > 0:
        raise ValueError(f"n_frames, frames and stride must be positive, got {n_frames}, {frames} and {stride}.")
    if not 0 <= start <= 1:
        raise ValueError(f"start is a fraction and must be in [0, 1], got {start}.")
    slack = max(0.0, n_frames - 1 - (frames - 1) * stride)
    indices = np.floor(start * slack + np.arange(frames) * stride + 1e-6).astype(np.int64)
    return np.minimum(indices, n_frames - 1)


def slowfast_clip(n_frames: int, *, frames: int, stride: float, start: float) -> np.ndarray:
    """Indices as PySlowFast, and with it the published code, takes them for a clip that starts at frame `start`.

    The clip is `frames * stride` frames long, and its frames are spread evenly from its first to its last, which makes
    them a little more than `stride` apart. A video that is too short is padded by its last frame.

    Source: PySlowFast, `get_start_end_idx` and `temporal_sampling`.

    Example:
        >>> slowfast_clip(300, frames=8, stride=16, start=0).tolist()
        [0, 18, 36, 54, 72, 90, 108, 127]
    """
    size = max(1.0, frames * stride)
    places = np.linspace(start, start + size - 1, frames, dtype=np.float32)  # float32, in which torch.linspace counts
    return np.clip(places, 0, n_frames - 1).astype(np.int64)


def segment_clip(n_frames: int, *, fractions: np.ndarray) -> np.ndarray:
    """One index in each of `len(fractions)` equal segments of a video, at these fractions, in [0, 1), of each.

    A video with fewer frames than segments shows some of them several times.

    Source: Wang et al. 2016 (temporal segment networks), as most other video CLIPs do it.

    Example:
        >>> segment_clip(16, fractions=np.full(4, 0.5)).tolist()
        [2, 6, 10, 14]
    """
    segments = len(fractions)
    return np.minimum((np.arange(segments) + fractions) * n_frames / segments, n_frames - 1).astype(np.int64)


def view_starts(views: int) -> np.ndarray:
    """Where the clips of `views` temporal views start, evenly spread: the middle for one view, else from 0 to 1."""
    return np.array([0.5]) if views == 1 else np.linspace(0, 1, views)


def _slack(n_frames: int, frames: int, stride: float) -> float:
    """Frames that are left over beside a clip of the published samplers."""
    return max(0.0, n_frames - max(1.0, frames * stride))


def _offset_start(slack: float, view: int, views: int) -> float:
    return slack // 2 if views == 1 else view * (slack // (views - 1))


_Random = Callable[[int, int, float, np.random.Generator], np.ndarray]
_Fixed = Callable[[int, int, float, int, int], np.ndarray]


def _slowfast_random(n: int, t: int, s: float, rng: np.random.Generator) -> np.ndarray:
    return slowfast_clip(n, frames=t, stride=s, start=rng.uniform(0, _slack(n, t, s)))


SAMPLERS: dict[str, tuple[_Random, _Fixed]] = {
    "dense": (
        lambda n, t, s, rng: dense_clip(n, frames=t, stride=s, start=rng.random()),
        lambda n, t, s, view, views: dense_clip(n, frames=t, stride=s, start=view_starts(views)[view]),
    ),
    "slowfast-offset": (
        _slowfast_random,
        lambda n, t, s, view, views: slowfast_clip(
            n, frames=t, stride=s, start=_offset_start(_slack(n, t, s), view, views)
        ),
    ),
    "slowfast-uniform": (
        _slowfast_random,
        lambda n, t, s, view, views: slowfast_clip(n, frames=t, stride=s, start=_slack(n, t, s) * view / views),
    ),
    "segment": (
        lambda n, t, s, rng: segment_clip(n, fractions=rng.random(t)),
        lambda n, t, s, view, views: segment_clip(n, fractions=np.full(t, (view + 0.5) / views)),
    ),
}
"""By name: the indices of a clip at a random place, and those of a test view."""
