"""Decoded frames kept on the disk: of a small set that many runs read, every video is decoded once."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from applications.openvclip.data.decode import Video


@dataclass(frozen=True)
class DecodedVideo:
    """All frames of a video, which are what `Video` gives, bit for bit."""

    frames: np.ndarray
    """(n, H, W, 3) uint8."""
    frames_per_second: float
    shortfall: str

    def chosen(self, choose: Callable[[int, float], Sequence[int]]) -> np.ndarray:
        return self.frames[choose(len(self.frames), self.frames_per_second)]


def decoded(path: Path, short_side: int, folder: Path) -> DecodedVideo:
    """A video out of a folder of decoded ones, where it is put if it is not there yet.

    Raises:
        VideoReadError: It can't be read.
    """
    status = path.stat() if path.is_file() else None
    key = [str(path.absolute()), short_side, *([status.st_size, status.st_mtime_ns] if status else [])]
    kept = folder / f"{hashlib.sha256(repr(key).encode()).hexdigest()}.npz"
    try:
        with kept.open("rb") as file, np.load(file) as arrays:
            return DecodedVideo(arrays["frames"], float(arrays["frames_per_second"]), str(arrays["shortfall"]))
    except (FileNotFoundError, EOFError, ValueError, KeyError, zipfile.BadZipFile):  # not there yet, or damaged
        pass
    video = Video(path, short_side)
    found = DecodedVideo(video.chosen(lambda n, _: range(n)), video.frames_per_second, video.shortfall)
    folder.mkdir(parents=True, exist_ok=True)
    from interpolate.atomic import replacing  # with torch, for which what reads videos need not wait

    with replacing(kept) as file:
        np.savez(file, **vars(found))
    return found
