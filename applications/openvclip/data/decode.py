"""Videos as users of this package open them: frames by index, of a size, and one kind of error."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import av
import numpy as np

from applications.openvclip.data.pixels import Pixels, scaled
from applications.openvclip.data.reader import Reader
from applications.openvclip.data.stream import Stream

av.logging.set_level(None)  # what goes wrong is raised, not printed by the C library

T = TypeVar("T")


class VideoReadError(RuntimeError):
    """A video could not be read; the message names the file and what is wrong."""


class Video:
    """A video file whose frames can be read by index, counted in order of presentation.

    Its frames are those that a decoding from start to end gives, turned and mirrored as a player shows them. A file
    that was cut off has the frames that are left, and `shortfall` says what is missing; one that is damaged
    before its end can't be read.

    Args:
        path: The file, in any container and codec that FFmpeg reads.
        short_side: Pixels of the shorter side of the frames, resized (bicubic) while decoding; by default their own.

    Raises:
        VideoReadError: The file is missing, empty, no video, or has no frame.
    """

    def __init__(self, path: Path, short_side: int | None = None) -> None:
        self.path = path
        if not path.is_file():
            raise VideoReadError(f"{path}: no such file.")
        self._short_side = short_side
        self._reader = _read(
            lambda: Reader(path), lambda: f"{path}: {path.stat().st_size} bytes, not a readable video."
        )

    def __len__(self) -> int:
        """As many frames as a decoding from start to end gives."""
        return len(self._reader.times)

    @property
    def frames_per_second(self) -> float:
        return self._reader.frames_per_second

    @property
    def times_s(self) -> np.ndarray:
        """When each frame is shown, in seconds from the first on: (frames,), by the frame rate where no stamps tell."""
        times = self._reader.times_s
        return np.arange(len(self)) / self.frames_per_second if times is None else times

    @property
    def shortfall(self) -> str:
        """How much of what the file announces is not in it, for a person to read; empty where it is whole."""
        return self._reader.shortfall

    @property
    def stream(self) -> Stream:
        """The facts of the video.

        Raises:
            VideoReadError: Not even the first frame could be decoded.
        """
        return _read(lambda: self._reader.stream, lambda: f"{self.path}: the first frame could not be decoded.")

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the frames, upright, in pixels."""
        return scaled(*self.stream.upright_size, self._short_side)

    def frames(self, indices: Sequence[int]) -> np.ndarray:
        """The frames at these indices, in this order: (len(indices), H, W, 3) uint8, RGB, upright.

        Raises:
            VideoReadError: A frame could not be decoded.
        """
        wanted = sorted(set(indices))
        found = _read(
            lambda: self._reader.read(wanted, Pixels(self._short_side)),
            lambda: (
                f"{self.path}: frames {wanted[0]} to {wanted[-1]} of {len(self)} could not be decoded; "
                "the file is damaged, fetch it again."
            ),
        )
        if len(found) < len(wanted):
            raise VideoReadError(
                f"{self.path}: {len(found)} of {len(wanted)} requested frames could be read; there are {len(self)}."
            )
        return np.stack([found[i] for i in indices])

    def chosen(self, choose: Callable[[int, float], Sequence[int]]) -> np.ndarray:
        """The frames that a function of the number of frames and the frame rate chooses.

        Where decoding shows that there are fewer frames than the file promised, it is asked again.

        Raises:
            VideoReadError: A frame could not be decoded.
        """
        promised = len(self)
        try:
            return self.frames(choose(promised, self.frames_per_second))
        except VideoReadError:
            if len(self) == promised:
                raise
        return self.frames(choose(len(self), self.frames_per_second))


def _read(action: Callable[[], T], what: Callable[[], str]) -> T:
    """The one place where readers written by others are called, and where whatever they raise becomes our error."""
    try:
        return action()
    except Exception as error:  # of many kinds, and none of them may end a run of many videos
        raise VideoReadError(f"{what()} {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """What the library says, without the places in its source where it says it."""
    text = re.sub(r"\[[\d:]+\] \S+:\d+: ", "", str(error)).strip().split("\n")[0]
    return text or type(error).__name__
