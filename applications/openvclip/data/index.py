"""What packets tell about frames without decoding them: how many there are, when each is shown, where one can start."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from itertools import pairwise

import av
from av.container import InputContainer
from av.video.stream import VideoStream

from applications.openvclip.data.stream import packets, shortfall

_ONE_PICTURE = {"h264", "hevc", "av1", "libdav1d"}
"""Codecs of which a packet of MP4, MOV and Matroska is one picture that is shown."""
_PICTURE_START = b"\0\0\1\xb6"
_LARGEST_STUB = 19
"""Bytes of the packet that stands, in a stream of packed B-frames, for a picture that came with the packet before."""


@dataclass(frozen=True)
class Key:
    """A packet from which a decoder can start."""

    pts: int
    place: int
    """Where to seek: its time of decoding, or where that is not known, as in Matroska, its time."""


@dataclass(frozen=True)
class Index:
    """The frames of a file, where its packets tell."""

    times: list[int]
    """When frames are shown, in order of presentation."""
    keys: list[Key]
    """In order of presentation; none where a frame does not carry the time of its packet."""

    def key_before(self, time: int) -> Key:
        return self.keys[bisect_right(self.keys, time, key=lambda key: key.pts) - 1]


def index_of(container: InputContainer, stream: VideoStream) -> Index | None:
    """The index of a file, or None where only a decoder knows what it holds.

    Packets tell in MP4, MOV, Matroska and AVI, for the codecs that `_Pictures` knows, if all of them are whole, as many
    as the file announces, and have a time of their own, and none is shown before the first key frame.
    """
    name = stream.codec_context.name
    containers = ("mp4", "matroska") if name in _ONE_PICTURE else ("mp4", "matroska", "avi")
    if not any(container_name in container.format.name for container_name in containers):
        return None
    # of an interlaced video two packets may be one frame; PyAV before 18 does not tell, and then the frames do
    if getattr(stream.codec_context, "field_order", 0) > 1:
        return None
    pictures = _Pictures(name)
    times: list[int] = []
    keys: list[Key] = []
    n, last, reordered = 0, 0, False
    for packet in packets(container, stream):
        if not packet.size:
            continue
        shown = pictures.shows(packet)
        if shown is None or packet.pts is None or packet.is_corrupt or not (keys or packet.is_keyframe):
            return None
        n, last, reordered = n + 1, max(last, packet.pts), reordered or packet.dts != packet.pts
        if packet.is_keyframe:
            keys.append(Key(packet.pts, packet.pts if packet.dts is None else packet.dts))
        if shown and not packet.is_discard:  # which is before the beginning of an edit list
            times.append(packet.pts)
    if stream.codec_context.has_b_frames and not reordered:  # times of decoding were written as times
        return None
    if not times or shortfall(container, stream, n, last):
        return None
    times.sort()
    if pictures.packed:
        return Index(times, [])
    in_order = all(a.pts < b.pts for a, b in pairwise(keys))
    if len(set(times)) < len(times) or not in_order or times[0] < keys[0].pts:
        return None
    return Index(times, keys)


class _Pictures:
    """Whether each packet of a stream, in their order, makes a decoder show a frame."""

    def __init__(self, codec: str) -> None:
        self.codec = codec
        self.packed = False
        """Whether a packet has held two pictures (MPEG-4 Part 2 with packed B-frames, as DivX and Xvid write it)."""
        self._pending = False  # one of them waits for the stub

    def shows(self, packet: av.Packet) -> bool | None:
        """None where it can't be told."""
        if self.codec in _ONE_PICTURE:
            return True
        if self.codec == "mpeg4":
            return self._mpeg4(packet)
        first, last = memoryview(packet)[0], memoryview(packet)[packet.size - 1]
        if self.codec in ("vp8", "libvpx"):
            return bool(first & 0x10)  # show_frame
        if self.codec in ("vp9", "libvpx-vp9"):
            if first >> 6 != 2 or first & 0x30 == 0x30:  # no frame marker, or profile 3
                return None
            # a superframe ends with its hidden frames' shown one; else show_existing_frame or show_frame
            return last & 0xE0 == 0xC0 or bool(first & 0x08) or bool(first & 0x02)
        return None

    def _mpeg4(self, packet: av.Packet) -> bool | None:
        pictures = bytes(packet).count(_PICTURE_START)
        if packet.size <= _LARGEST_STUB and pictures:  # else a picture of which nothing is coded, which may be shown
            pending, self._pending = self._pending, False
            return True if pending else None
        if pictures > 1:
            if self._pending or pictures > 2:
                return None
            self.packed = self._pending = True
        return pictures > 0
