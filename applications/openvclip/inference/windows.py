"""When in a long video: windows along its time, what each shows, and the segments that they make."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from applications.openvclip.data.decode import VideoReadError
from applications.openvclip.data.storage import Cache
from applications.openvclip.data.views import evaluation_crops, opened
from applications.openvclip.data.workers import Workers
from applications.openvclip.inference.classifier import Classifier

_CHUNK = 16
"""Windows that a reading process reads at a time: memory is that of a few chunks, however long the video."""


class Place(NamedTuple):
    """Where in a video to read."""

    location: str
    first: int
    """Number of the first window."""

    def __str__(self) -> str:
        return self.location


@dataclass(frozen=True)
class Windows:
    """Reads the clips of some windows of a video: what a reading process does for a key.

    A clip's frames are spread evenly over its window, by the time stamps of the video. Windows begin every `step_s`
    seconds; the last one ends with the video. One that is shorter than a window is one.

    Values are the clips (n, 3, T, size, size) uint8 of at most `_CHUNK` windows, the length of the video in seconds,
    and the shortfall of a video that was cut off.
    """

    window_s: float
    step_s: float
    frames: int
    """Of a clip."""
    size: int
    cache: Cache

    def __post_init__(self) -> None:
        for name, value in (("window", self.window_s), ("step", self.step_s)):
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be a positive number of seconds, got {value}.")

    def starts(self, length_s: float) -> np.ndarray:
        """When the windows of a video of this length begin, in seconds.

        Example:
            >>> Windows(2, 1, frames=8, size=224, cache=Cache()).starts(4.5).tolist()
            [0.0, 1.0, 2.0, 2.5]
        """
        latest = max(0.0, length_s - self.window_s)
        return np.minimum(np.arange(math.ceil(latest / self.step_s - 1e-6) + 1) * self.step_s, latest)

    def __call__(self, place: Place) -> tuple[np.ndarray, float, str]:
        location, first = place
        with opened(location, self.cache, self.size) as video:

            def choose(n_frames: int, frames_per_second: float) -> list[int]:
                nonlocal length_s
                times = video.times_s
                length_s = float(times[-1]) + 1 / frames_per_second
                starts = self.starts(length_s)[first : first + _CHUNK]
                places = (np.arange(self.frames) + 0.5) / self.frames * min(self.window_s, length_s)
                shown = np.searchsorted(times, (starts[:, None] + places).ravel() + 1e-6, side="right") - 1
                return shown.clip(0, n_frames - 1).tolist()

            length_s = 0.0
            frames = video.chosen(choose)
            shortfall = video.shortfall
        clips = frames.reshape(-1, self.frames, *frames.shape[1:])
        crops = [evaluation_crops(clip, size=self.size, crops=1) for clip in clips]
        return np.concatenate(crops), length_s, shortfall


@dataclass(frozen=True)
class Timeline:
    """What a video shows along its time."""

    video: str
    length_s: float
    starts: np.ndarray
    """When each window begins, in seconds, (W,)."""
    window_s: float
    embeddings: Tensor
    """(W, E), as `Classifier.embed` gives them."""
    pictures: np.ndarray
    """The middle frame of each window: (W, size, size, 3) uint8."""
    shortfall: str = ""

    @property
    def middles(self) -> np.ndarray:
        """Of the windows, in seconds."""
        return self.starts + min(self.window_s, self.length_s) / 2


@dataclass(frozen=True)
class Segment:
    """A stretch of a video in which one label is the best."""

    start_s: float
    end_s: float
    label: str
    probability: float
    """The mean over its windows."""


def look_along(
    classifier: Classifier,
    video: str,
    windows: Windows,
    *,
    workers: int,
    time_limit_s: float,
    advance: Callable[[int, int], object] = lambda done, total: None,
) -> Timeline:
    """Look at a video's windows, one after another.

    Args:
        classifier: The model.
        video: Path or URL.
        windows: Which.
        workers: Processes that decode.
        time_limit_s: Seconds that reading some of the windows may take.
        advance: Told how many windows are done, of how many.

    Raises:
        VideoReadError: The video can't be read.
    """
    with Workers(windows, workers, time_limit_s) as pool:
        first = pool.ask(Place(video, 0))
        if isinstance(first, VideoReadError):
            raise first
        _, length_s, shortfall = first
        starts = windows.starts(length_s)
        others = pool.map(Place(video, i) for i in range(_CHUNK, len(starts), _CHUNK))
        embeddings, pictures = [], []
        for answer in chain([first], others):
            if isinstance(answer, VideoReadError):
                raise answer
            clips = answer[0]
            embeddings.append(classifier.embed(torch.from_numpy(clips)))
            pictures.append(clips[:, :, windows.frames // 2])
            advance(sum(map(len, pictures)), len(starts))
    stills = np.concatenate(pictures).transpose(0, 2, 3, 1)
    return Timeline(video, length_s, starts, windows.window_s, torch.cat(embeddings), stills, shortfall)


def segments(timeline: Timeline, labels: Sequence[str], probabilities: np.ndarray) -> list[Segment]:
    """Neighbouring windows with the same best label as one stretch; the stretches meet halfway, and leave nothing out.

    Args:
        timeline: The windows.
        labels: K of them.
        probabilities: (W, K).
    """
    middles, best = timeline.middles, probabilities.argmax(axis=1)
    bounds = np.concatenate([[0.0], (middles[:-1] + middles[1:]) / 2, [timeline.length_s]])
    found = []
    for k, group in groupby(range(len(best)), key=lambda w: int(best[w])):
        same = list(group)
        mean = float(probabilities[same, k].mean())
        found.append(Segment(float(bounds[same[0]]), float(bounds[same[-1] + 1]), labels[k], mean))
    return found


def seconds(text: str, option: str) -> float:
    """A duration as people write it: "2s", "0.5 s", "2".

    Raises:
        ValueError: It is none, or not positive.
    """
    found = re.fullmatch(r"(\d+(\.\d*)?|\.\d+) ?s?", text.strip())
    if not found or not float(found[1]) > 0:
        raise ValueError(f"{option}: a positive number of seconds is expected, such as 2s or 0.5s, got {text!r}.")
    return float(found[1])
