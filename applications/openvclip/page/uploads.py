"""Videos that strangers send: what is taken, and how it is read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np

from applications.openvclip.data.decode import VideoReadError
from applications.openvclip.data.views import EvaluationViews, opened
from applications.openvclip.inference.windows import Place, Windows

CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,gif"
"""Demuxers of FFmpeg that read nothing but the file they are given: a playlist, or a list of files to join, would have
this machine open whatever places it names."""

_WINDOWS = 15


class Looks(NamedTuple):
    """What is kept of an upload: pixels of the model's size, and no file."""

    views: np.ndarray
    """(V, 3, T, size, size) uint8."""
    windows: np.ndarray
    """Clips along its time, (W, 3, T, size, size) uint8; none of a short video."""
    starts: np.ndarray
    """When each window begins, in seconds, (W,)."""
    window_s: float
    length_s: float
    shortfall: str


@dataclass(frozen=True)
class UploadReader:
    """Reads an upload by its path: what a reading process does for a key.

    A video several times as long as one clip is looked at along its time, too.

    Raises:
        VideoReadError: It is none, or beyond what is taken; the message is for the person who sent it.
    """

    views: EvaluationViews
    max_minutes: float = 5
    max_side: int = 4096
    """Pixels of the longer side."""

    def __call__(self, location: str) -> Looks:
        path = Path(location)
        self._check_header(path)
        try:
            s = self.views.sampling
            with opened(location, self.views.cache, self.views.size) as video:
                length_s = float(video.times_s[-1]) + 1 / video.frames_per_second
                clip_s = s.frames * s.stride / (s.target_fps or video.frames_per_second)
            if length_s > 60 * self.max_minutes:
                raise VideoReadError(
                    f"This video is {length_s / 60:.1f} minutes long; up to {self.max_minutes:g} are taken. Cut out "
                    "the part that matters."
                )
            views, shortfall = self.views(location)
            if length_s < 2 * clip_s:
                none = np.empty((0, *views.shape[1:]), np.uint8)
                return Looks(views, none, np.empty(0), clip_s, length_s, shortfall)
            window_s = max(clip_s, 2 * length_s / (_WINDOWS + 1))
            windows = Windows(window_s, window_s / 2, s.frames, self.views.size, self.views.cache)
            clips, length_s, _ = windows(Place(location, 0))
            return Looks(views, clips, windows.starts(length_s)[: len(clips)], window_s, length_s, shortfall)
        except VideoReadError as error:
            raise VideoReadError(str(error).replace(f"{location}: ", "")) from error

    def _check_header(self, path: Path) -> None:
        """Refuse what is no video, or too large to be scaled down here."""
        if not path.is_file() or not path.stat().st_size:
            raise VideoReadError("This file is empty.")
        try:
            with av.open(str(path), options={"format_whitelist": CONTAINERS}) as container:
                if not container.streams.video:
                    raise VideoReadError("There is no picture in this file, so there is nothing to look at.")
                sides = container.streams.video[0].width, container.streams.video[0].height
        except av.FFmpegError as error:
            raise VideoReadError("This file is no video that can be read here (mp4, webm, mkv, mov, avi).") from error
        if max(sides) > self.max_side:
            raise VideoReadError(
                f"This video is {sides[0]} x {sides[1]} pixels; up to {self.max_side} on the longer side are taken. "
                "Scale it down, the model sees far less anyway."
            )
