"""Reading frames out of video files: decord where its random access is exact, PyAV for everything else."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import decord
import numpy as np
from PIL import Image

decord.logging.set_level(decord.logging.FATAL)  # what goes wrong is raised, not printed by the C library
av.logging.set_level(None)


class VideoReadError(RuntimeError):
    """A video could not be read; the message names the file and what is wrong."""


class Video:
    """A video file whose frames can be read by index, counted in order of presentation.

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
        try:
            self.stream = probe(path)
        except (av.FFmpegError, ValueError) as error:
            raise VideoReadError(
                f"{path}: {path.stat().st_size} bytes, not a readable video. {_reason(error)}"
            ) from error
        height, width = self.stream.upright_size
        scale = 1 if short_side is None else short_side / min(height, width)
        self.size = (max(1, round(height * scale)), max(1, round(width * scale)))
        """Height and width of the frames, upright, in pixels."""

    def __len__(self) -> int:
        return self.stream.frames

    @property
    def frames_per_second(self) -> float:
        return self.stream.frames_per_second

    def frames(self, indices: Sequence[int]) -> np.ndarray:
        """The frames at these indices, in this order: (len(indices), H, W, 3) uint8, RGB, upright.

        Raises:
            VideoReadError: A frame could not be decoded.
        """
        try:
            if self.stream.decord_is_exact:
                try:
                    return read_with_decord(self.path, self.stream, self.size, indices)
                except (decord.DECORDError, RuntimeError, AssertionError):  # it asserts that there are frames
                    pass
            return read_with_pyav(self.path, self.stream, self.size, indices)
        except (av.FFmpegError, ValueError) as error:
            raise VideoReadError(
                f"{self.path}: frames {min(indices)} to {max(indices)} of {len(self)} could not be decoded; "
                f"the file is damaged, fetch it again. {_reason(error)}"
            ) from error


@dataclass(frozen=True)
class Stream:
    """What the first frame and the packets of a file tell, without decoding more."""

    height: int
    width: int
    """As stored, before turning."""
    rotation: int
    """By which frames are to be turned counter-clockwise, in degrees."""
    pixel_format: str
    container: str
    codec: str
    frames: int
    frames_per_second: float
    """The average, where the rate varies."""
    has_leading_frames: bool
    """Whether frames are shown before the key frame that they are stored after (open groups of pictures)."""

    @property
    def upright_size(self) -> tuple[int, int]:
        """Height and width as one sees them, in pixels."""
        return (self.height, self.width) if self.rotation % 180 == 0 else (self.width, self.height)

    @property
    def decord_is_exact(self) -> bool:
        """Whether decord gives the very frames that were asked for, in the right colours, at any size.

        It counts wrongly after a seek to a key frame with leading frames, and in containers without reliable time
        stamps (AVI, MPEG-TS); it scales turned frames to six channels; its 10-bit colours are off.
        """
        timed = "mp4" in self.container or "matroska" in self.container
        plain = self.rotation % 360 == 0 and self.pixel_format in ("yuv420p", "yuvj420p")
        return timed and plain and not self.has_leading_frames


def probe(path: Path) -> Stream:
    """Look at the packets and decode the first frame; raises av.FFmpegError or ValueError where there is none."""
    with av.open(str(path)) as container:
        if not container.streams.video:
            raise ValueError("There is no video in it, only other streams.")
        stream = container.streams.video[0]
        rate = stream.average_rate or stream.guessed_rate
        if not rate:
            raise ValueError("Its frame rate is not known.")
        frames, last_key, leading = 0, None, False
        for packet in container.demux(stream):
            if packet.size and not packet.is_discard:
                frames += 1
                last_key = packet.pts if packet.is_keyframe else last_key
                leading |= packet.pts is None or last_key is None or packet.pts < last_key
        container.seek(0)
        first = next(iter(container.decode(stream)), None)
        if first is None:
            raise ValueError("The video has no frame.")
        return Stream(
            height=first.height,
            width=first.width,
            rotation=first.rotation,
            pixel_format=first.format.name,
            container=container.format.name,
            codec=stream.codec_context.name,
            frames=frames,
            frames_per_second=float(rate),
            has_leading_frames=leading,
        )


def read_with_decord(path: Path, stream: Stream, size: tuple[int, int], indices: Sequence[int]) -> np.ndarray:
    """Frames of a size (height, width) by seeking to the key frames that are needed: (len(indices), H, W, 3) uint8.

    Raises whatever goes wrong.
    """
    # a frame that decord made up from its neighbours is an error, not a frame: fault_tol is their tolerated share
    tolerated: Any = 1e-9  # annotated as an integer, documented as either
    # decord can't hand out frames of some widths below 128 (16, 24, 32, 48, 96), so small ones are resized afterwards
    small = size[1] < 128
    height, width = stream.upright_size if small else size
    reader = decord.VideoReader(str(path), width=width, height=height, num_threads=1, fault_tol=tolerated)
    if len(reader) != stream.frames:
        raise RuntimeError(f"decord finds {len(reader)} frames, and there are {stream.frames}.")
    frames = reader.get_batch(list(indices)).asnumpy()
    if frames.shape != (len(indices), height, width, 3):
        raise RuntimeError(f"decord returned {frames.shape} instead of {(len(indices), height, width, 3)}.")
    if small and (height, width) != size:
        images = (Image.fromarray(frame).resize((size[1], size[0]), Image.Resampling.BICUBIC) for frame in frames)
        frames = np.stack([np.asarray(image) for image in images])
    return frames


def read_with_pyav(path: Path, stream: Stream, size: tuple[int, int], indices: Sequence[int]) -> np.ndarray:
    """The same by decoding from the first frame to the last that is needed: right in every codec and container."""
    wanted = set(indices)
    found: dict[int, np.ndarray] = {}
    height, width = size if stream.rotation % 180 == 0 else size[::-1]
    with av.open(str(path)) as container:
        for i, frame in enumerate(container.decode(container.streams.video[0])):
            if i in wanted:
                pixels = frame.to_ndarray(format="rgb24", width=width, height=height, interpolation="BICUBIC")
                found[i] = np.rot90(pixels, stream.rotation // 90)
                if len(found) == len(wanted):
                    break
    if len(found) < len(wanted):
        raise ValueError(f"{len(found)} of {len(wanted)} requested frames could be read ({stream.frames} announced).")
    return np.stack([found[i] for i in indices])


def _reason(error: Exception) -> str:
    """What the library says, without the places in its source where it says it."""
    return re.sub(r"\[[\d:]+\] \S+:\d+: ", "", str(error)).strip().split("\n")[0]
