"""Test views of a video: what a reading process does for a location. It needs no torch, whose import takes seconds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from applications.openvclip.data.decode import Video, VideoReadError
from applications.openvclip.data.decoded import decoded
from applications.openvclip.data.sampling import Sampling
from applications.openvclip.data.storage import Cache, FetchError, is_url


@contextmanager
def fetched(location: str, cache: Cache) -> Iterator[Path]:
    """The file of a video by path or URL, for the length of a `with` block; errors name it as the manifest does.

    Raises:
        VideoReadError: It could not be fetched; also for what goes wrong inside the block.
    """
    try:
        with cache.local(location) as path:
            try:
                yield path
            except VideoReadError as error:
                raise VideoReadError(str(error).replace(str(path), location)) from error
    except FetchError as error:
        raise VideoReadError(str(error)) from error


@contextmanager
def opened(location: str, cache: Cache, short_side: int | None = None) -> Iterator[Video]:
    """A video by path or URL, as `fetched` has it."""
    with fetched(location, cache) as path:
        yield Video(path, short_side)


def chosen_frames(
    location: str, cache: Cache, short_side: int, choose: Callable[[int, float], Sequence[int]]
) -> tuple[np.ndarray, str]:
    """The frames (n, H, W, 3) that a function of their number and the frame rate chooses, and the video's shortfall.

    They come from the folder of decoded videos, if there is to be one; videos by URL are always decoded.
    """
    with fetched(location, cache) as path:
        if cache.decoded is None or is_url(location):
            video = Video(path, short_side)
        else:
            video = decoded(path, short_side, cache.decoded)
        return video.chosen(choose), video.shortfall


@dataclass(frozen=True)
class EvaluationViews:
    """All test views of a video from one decoding, and its shortfall if it was cut off, by location.

    The views are (V, 3, T, size, size) uint8, a clip's crops together.
    """

    sampling: Sampling
    size: int
    cache: Cache

    def __call__(self, location: str) -> tuple[np.ndarray, str]:
        s = self.sampling
        frames, shortfall = chosen_frames(
            location,
            self.cache,
            self.size,
            lambda n, fps: np.concatenate([s.test_clip(n, fps, view) for view in range(s.views)]).tolist(),
        )
        clips = frames.reshape(s.views, s.frames, *frames.shape[1:])
        crops = [evaluation_crops(clip, size=self.size, crops=s.crops) for clip in clips]
        return np.concatenate(crops), shortfall


def evaluation_crops(frames: np.ndarray, *, size: int, crops: int) -> np.ndarray:
    """The centre, or the first, centre and last crop of the longer side: (T, H, W, 3) → (crops, 3, T, size, size)."""
    clip = frames.transpose(3, 0, 1, 2)
    slack = [side - size for side in clip.shape[-2:]]
    offsets = [0.5] if crops == 1 else [0.0, 0.5, 1.0]
    cut = []
    for offset in offsets:
        top, left = (math.ceil(s * (offset if s == max(slack) else 0.5)) for s in slack)
        cut.append(clip[..., top : top + size, left : left + size])
    return np.stack(cut)
