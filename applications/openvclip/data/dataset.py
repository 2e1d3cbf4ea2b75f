"""Videos of a manifest as training clips and as test views: what a reading process does for a key."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from applications.openvclip.data import transforms
from applications.openvclip.data.augmentation import Augmentation
from applications.openvclip.data.decode import Video, VideoReadError
from applications.openvclip.data.decoded import decoded
from applications.openvclip.data.manifest import Manifest
from applications.openvclip.data.sampling import Sampling
from applications.openvclip.data.storage import Cache, FetchError, is_url

TrainingKey = tuple[int, int, int]
"""Epoch, index in the manifest, and how many other videos have been tried for it."""


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
        clip = transforms.training_clip(frames, size=self.size, augmentation=self.augmentation, rng=rng)
        return clip.numpy(), self.manifest.labels[i], shortfall


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
        crops = [transforms.evaluation_crops(clip, size=self.size, crops=s.crops).numpy() for clip in clips]
        return np.concatenate(crops), shortfall
