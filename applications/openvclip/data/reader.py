"""Frames by index out of any video that FFmpeg reads, through PyAV; frame i is frame i of a decoding from start to end.

Where the packets of a file tell which frames there are and when each is shown (see `index.py`), only what is needed is
decoded: from the last key frame before each wanted frame on, and of that no frame that nothing refers to. Frames are
told by their time stamps, and their pixels are those of the plain decoding, bit for bit. Where packets tell only how
many frames there are, they are decoded from the first to the last that is wanted. Where packets do not tell, or have
promised what the decoder does not give, everything is decoded once from start to end to count the frames: streams that
begin inside a group, fields in packets of their own, files that are cut off, missing or repeated time stamps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import av
import numpy as np

from applications.openvclip.data.index import Index, Key, index_of
from applications.openvclip.data.stream import (
    Stream,
    frame_rate,
    open_container,
    orientation_of,
    packets,
    shortfall,
    shown_stream,
)

Convert = Callable[[av.VideoFrame], np.ndarray]

_SKIPPING = {"h264", "hevc", "mpeg4", "vp8"}
"""Codecs whose decoders can leave out frames that nothing refers to."""
_HELD_BYTES = 256 * 2**20
"""Of decoded frames that are kept once they had to be counted by decoding: most are wanted in a moment."""


class Reader:
    """A video of which frames can be read; `decode.Video` is what users call.

    Raises whatever PyAV raises, or ValueError with a reason.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.times: Sequence[int | None] = []
        """When each frame is shown, in order, in units of the stream's time base; None where that is not known."""
        self.shortfall = ""
        self._first: av.VideoFrame | None = None
        self._held: list[av.VideoFrame] | None = None
        self._open()
        self._index = index_of(self._container, self._video)
        if self._index is None:
            self._count()
        else:
            self.times = self._index.times

    @property
    def frames_per_second(self) -> float:
        return frame_rate(self._video, self.times)

    @property
    def times_s(self) -> np.ndarray | None:
        """When each frame is shown, in seconds from the first on; None where a frame has no time stamp."""
        if self._video.time_base is None or any(time is None for time in self.times):
            return None
        times = np.sort(np.array(self.times, np.float64))  # packed B-frames swap their stamps
        return (times - times[0]) * float(self._video.time_base)

    @property
    def stream(self) -> Stream:
        """The facts, for which the first frame is decoded."""
        if self._first is None:
            self._reopen()
            self._first = next(self._frames(), None)
        if self._first is None:
            raise ValueError("The video has no frame.")
        return Stream(
            height=self._first.height,
            width=self._first.width,
            orientation=orientation_of(self._first),
            pixel_format=self._first.format.name,
            container=self._container.format.name,
            codec=self._video.codec_context.name,
            frames=len(self.times),
            frames_per_second=self.frames_per_second,
            shortfall=self.shortfall,
        )

    def read(self, indices: Sequence[int], convert: Convert) -> dict[int, np.ndarray]:
        """Converted frames by index, of indices that ascend and do not repeat; what is not there is left out."""
        if self._index is not None:
            by_time = bool(self._index.keys)
            found = self._by_time(self._index, indices, convert) if by_time else self._in_order(indices, convert)
            if len(found) == len(indices):
                return found
            self._index = None  # its packets have promised too much
            self._count()
        if self._held is not None:
            return {i: convert(self._held[i]) for i in indices if i < len(self._held)}
        return self._in_order(indices, convert)

    def _open(self) -> None:
        self._container = open_container(self.path)
        self._video = shown_stream(self._container)
        self._video.codec_context.thread_count = 1  # a reading process has one core

    def _reopen(self) -> None:
        """Begin again: not every container can be rewound, and not every decoder forgets."""
        self._container.close()
        self._open()

    def _in_order(self, indices: Sequence[int], convert: Convert) -> dict[int, np.ndarray]:
        """The frames by decoding from the first one on."""
        self._reopen()
        wanted, found = set(indices), {}
        for i, frame in enumerate(self._frames()):
            if i in wanted:
                found[i] = convert(frame)
                if len(found) == len(wanted):
                    break
        return found

    def _by_time(self, index: Index, indices: Sequence[int], convert: Convert) -> dict[int, np.ndarray]:
        """The frames, each from the last key frame before it; fewer where they are not what the packets promised."""
        number = {index.times[i]: i for i in indices}
        found = {}
        for key, times in groupby(number, index.key_before):
            missing = {key.pts, *times}
            before = -math.inf
            self._container.seek(key.place, stream=self._video)
            for frame in self._group(key, frozenset(missing)):
                if frame.pts is None or frame.pts <= before or frame.interlaced_frame:
                    return found  # wrong time stamps; or two packets may be one frame
                before = frame.pts
                missing.discard(frame.pts)
                if frame.pts in number and number[frame.pts] not in found:
                    found[number[frame.pts]] = convert(frame)
                if not missing:
                    break
        return found

    def _group(self, key: Key, wanted: frozenset[int]) -> Iterator[av.VideoFrame]:
        """Frames from a key frame on: the wanted ones, and what the decoder can't leave out."""
        begun, skipped, skips = False, None, self._video.codec_context.name in _SKIPPING
        for packet in packets(self._container, self._video):
            begun |= packet.pts == key.pts
            if begun and skips:
                skip = "DEFAULT" if packet.pts in wanted else "NONREF"
                if skip != skipped:  # setting it takes longer than decoding a small frame
                    self._video.codec_context.skip_frame = skipped = skip
            if begun:
                yield from packet.decode()

    def _count(self) -> None:
        """Decode from start to end."""
        self._reopen()
        times: list[int | None] = []
        held: list[av.VideoFrame] = []
        size, seen = 0, _Seen()
        for frame in self._frames(seen):
            self._first = frame if not times else self._first
            times.append(frame.pts)
            seen.broken_off |= frame.is_corrupt
            size += sum(plane.buffer_size for plane in frame.planes)
            if size <= _HELD_BYTES:
                held.append(frame)
            else:
                held.clear()
        if not times:
            raise ValueError("The video has no frame.")
        self.times, self._held = times, held or None
        self.shortfall = shortfall(self._container, self._video, seen.packets, seen.last_time)
        if seen.broken_off and not self.shortfall:
            self.shortfall = "it breaks off inside a frame"

    def _frames(self, seen: _Seen | None = None) -> Iterator[av.VideoFrame]:
        """All frames, in order of presentation, of a container that has just been opened.

        Raises:
            av.FFmpegError: A packet can't be decoded. If it is the last one, the file was cut off inside of it, and its
                frames end before.
        """
        seen = _Seen() if seen is None else seen
        remaining = packets(self._container, self._video)
        for packet in remaining:
            if packet.size:
                seen.packets += 1
                seen.last_time = max((t for t in (seen.last_time, packet.pts) if t is not None), default=None)
            try:
                frames = packet.decode()
            except av.FFmpegError:
                if any(later.size for later in remaining):
                    raise
                frames, seen.broken_off = self._video.codec_context.decode(None), True
            yield from frames


@dataclass
class _Seen:
    """What went by while decoding."""

    packets: int = 0
    last_time: int | None = None
    """The latest time stamp of a packet."""
    broken_off: bool = False
    """Whether a frame is not whole."""
