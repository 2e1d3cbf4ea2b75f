"""What a video file holds: the stream that a player shows, how it is turned, how fast it runs, whether it is whole."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
from av.container import InputContainer
from av.stream import Disposition
from av.video.stream import VideoStream


@dataclass(frozen=True)
class Orientation:
    """How stored pixels become those that a player shows: first transposed, then mirrored."""

    transposed: bool = False
    """Whether rows become columns."""
    rows_reversed: bool = False
    columns_reversed: bool = False

    def upright(self, pixels: np.ndarray) -> np.ndarray:
        """Pixels (H, W, …) as a player shows them, without a copy."""
        pixels = pixels.swapaxes(0, 1) if self.transposed else pixels
        return pixels[:: -1 if self.rows_reversed else 1, :: -1 if self.columns_reversed else 1]

    def turned(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width of what had this size, before or after."""
        return (size[1], size[0]) if self.transposed else size


@dataclass(frozen=True)
class Stream:
    """The facts of a video."""

    height: int
    width: int
    """As stored, before turning."""
    orientation: Orientation
    pixel_format: str
    container: str
    codec: str
    frames: int
    """As many as a decoding from start to end gives."""
    frames_per_second: float
    shortfall: str
    """How much of what the file announces is not in it, for a person to read; empty where it is whole."""

    @property
    def upright_size(self) -> tuple[int, int]:
        """Height and width as one sees them, in pixels."""
        return self.orientation.turned((self.height, self.width))


def open_container(path: Path) -> InputContainer:
    """Open a file, whatever it is called and in whatever encoding its title and comments are."""
    url = f"file:{path.absolute()}"  # FFmpeg takes the "12:" of 12:30.mp4 for a protocol
    try:
        return av.open(url, metadata_errors="replace")
    except TypeError:  # PyAV 19 has no such argument, and no error to ask it for
        return av.open(url)


def shown_stream(container: InputContainer) -> VideoStream:
    """The stream that a player shows: the first that is marked as default, else the first; never a cover picture."""
    streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not streams:
        raise ValueError("There is no video in it, only other streams.")
    return next((s for s in streams if s.disposition & Disposition.default), streams[0])


def packets(container: InputContainer, stream: VideoStream) -> Iterator[av.Packet]:
    """The packets of a stream, the empty one last that makes a decoder give what it holds back.

    Where a container breaks off, so do they: nobody can tell what would follow.
    """
    demuxed = container.demux(stream)
    while True:
        try:
            packet = next(demuxed, None)
        except av.FFmpegError:
            packet = None
        if packet is None:
            return
        yield packet


def orientation_of(frame: av.VideoFrame) -> Orientation:
    """How a frame is to be shown, by its display matrix; of angles between, the nearest right one."""
    try:
        matrix = frame.side_data.get("DISPLAYMATRIX")
    except (ValueError, IndexError):  # PyAV before 19 fails where a frame carries other data that it does not know
        turns = frame.rotation // 90 % 4
        return Orientation(turns % 2 == 1, rows_reversed=turns in (1, 2), columns_reversed=turns in (2, 3))
    if matrix is None:
        return Orientation()
    a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5].tolist()  # x' = a x + c y, y' = b x + d y
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return Orientation(False, rows_reversed=d < 0, columns_reversed=a < 0)
    return Orientation(True, rows_reversed=b < 0, columns_reversed=c < 0)


def frame_rate(stream: VideoStream, times: Sequence[int | None]) -> float:
    """Frames per second, by the time stamps of the frames in order of presentation, in units of the stream's time base.

    The mean, without what takes ten times the usual step or more: a picture that is held is no frame rate. What the
    file claims is exact where the time stamps agree with it (they are rounded, and one may be left out), and wrong
    where they do not: 1000 in recordings of browsers, 90,000, 1.2 for a last picture that is held. It is all there is
    where most frames carry no time stamps.
    """
    claimed = float(stream.average_rate or stream.guessed_rate or 0)
    steps = np.diff(np.sort(np.array(times, np.float64)))  # None becomes nan; packed B-frames swap their stamps
    steps = steps[steps > 0]
    if 2 * len(steps) >= len(times) > 1 and stream.time_base is not None:
        usual = float(steps[steps < 10 * np.median(steps)].mean())
        counted = 1 / (usual * float(stream.time_base))
        return claimed if abs(claimed - counted) < 0.02 * counted else counted
    if claimed:
        return claimed
    if len(times) == 1:
        return 1.0  # of a still, every clip is the same
    raise ValueError("Its frame rate is not known: its frames have no time stamps.")


def shortfall(container: InputContainer, stream: VideoStream, n_packets: int, last_time: int | None) -> str:
    """What is missing of what a file announces, in words; a transport stream announces nothing.

    Args:
        container: Of the stream.
        stream: The stream.
        n_packets: How many packets there are.
        last_time: When the last frame is shown, in units of the stream's time base.
    """
    few = 2 + 0.02 * stream.frames  # AVI counts pictures that were left out
    if stream.frames and stream.frames - n_packets <= few:
        return ""
    of_frames = f"{n_packets} of the {stream.frames} frames that it announces are there"
    if container.format.name == "avi":
        return of_frames if stream.frames else ""
    announced, start = _announced_seconds(container, stream), (container.start_time or 0) / av.time_base
    if announced is None or last_time is None or stream.time_base is None:
        return ""
    there = last_time * float(stream.time_base) - start
    if stream.frames:  # an edit list may leave out the rest
        return of_frames if there < 0.98 * announced else ""
    # the sound may go on for a moment, and the last frame be shown for long
    return f"{there:.1f} of the {announced:.1f} s that it announces are there" if there < 0.9 * announced - 0.5 else ""


def _announced_seconds(container: InputContainer, stream: VideoStream) -> float | None:
    """The length of the stream, or of the longest one where only that is told."""
    tag = stream.metadata.get("DURATION", "")  # of Matroska, 00:00:04.023000000
    if re.fullmatch(r"\d+:\d\d:\d\d(\.\d+)?", tag):
        hours, minutes, seconds = map(float, tag.split(":"))
        return 3600 * hours + 60 * minutes + seconds
    return container.duration / av.time_base if container.duration else None
