"""Reading frames out of video files, through decord."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import decord
import numpy as np

decord.logging.set_level(decord.logging.FATAL)  # what goes wrong is raised, not printed by the C library


class VideoReadError(RuntimeError):
    """A video could not be read; the message names the file and what is wrong."""


class Video:
    """A video file whose frames can be read by index.

    Args:
        path: The file, in any container and codec that FFmpeg reads.

    Raises:
        VideoReadError: The file is missing, empty, no video, or has no frame.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise VideoReadError(f"{path}: no such file.")
        try:
            self._reader = decord.VideoReader(str(path), num_threads=1)
        except (decord.DECORDError, RuntimeError) as error:
            raise VideoReadError(
                f"{path}: {path.stat().st_size} bytes, not a readable video. {_reason(error)}"
            ) from error
        if len(self._reader) == 0:
            raise VideoReadError(f"{path}: the video has no frame.")

    def __len__(self) -> int:
        return len(self._reader)

    @property
    def frames_per_second(self) -> float:
        return float(self._reader.get_avg_fps())

    def frames(self, indices: Sequence[int]) -> np.ndarray:
        """The frames at these indices, in this order: (len(indices), H, W, 3) uint8, RGB.

        Raises:
            VideoReadError: A frame could not be decoded.
        """
        try:
            frames = self._reader.get_batch(list(indices)).asnumpy()
        except (decord.DECORDError, RuntimeError) as error:
            raise VideoReadError(
                f"{self.path}: frames {min(indices)} to {max(indices)} of {len(self)} could not be decoded; "
                f"the file is damaged, fetch it again. {_reason(error)}"
            ) from error
        if len(frames) != len(indices):
            raise VideoReadError(f"{self.path}: {len(frames)} of {len(indices)} requested frames could be read.")
        return frames


def _reason(error: Exception) -> str:
    """What decord says, without the places in its source where it says it."""
    return re.sub(r"\[[\d:]+\] \S+:\d+: ", "", str(error)).strip().split("\n")[0]
