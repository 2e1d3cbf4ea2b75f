"""Which frames of a video make a clip: pure functions of its length."""

from __future__ import annotations

import numpy as np


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


def view_starts(views: int) -> np.ndarray:
    """Where the clips of `views` temporal views start, evenly spread: the middle for one view, else from 0 to 1."""
    return np.array([0.5]) if views == 1 else np.linspace(0, 1, views)
