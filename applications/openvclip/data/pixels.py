"""From a decoded frame to the pixels that a player shows: colours, size and orientation."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import av
import numpy as np
from av.filter import Graph

from applications.openvclip.data.stream import Orientation, orientation_of


class Pixels:
    """Frames → (H, W, 3) uint8, RGB, upright, all of the size of the first.

    Colours and size change in one step of FFmpeg's scaler: bicubic, and with a colour for each pixel. Left to itself it
    gives two neighbours one colour where the width is even; in frames of 32 pixels that is half of the error. A frame
    of 4:2:0 and 8 bits that keeps its size has, as in players, one colour for 2 x 2 pixels. The matrix (BT.601, BT.709,
    BT.2020) and the range are those that the frame carries; a frame that names none is taken for BT.601 of limited
    range, as FFmpeg does whatever its size. The colours of interlaced frames belong to every second line. Transparency
    is left out.

    Args:
        short_side: Pixels of the shorter side; by default that of the first frame.
    """

    def __init__(self, short_side: int | None = None) -> None:
        self._short_side = short_side
        self._orientation = Orientation()
        self._size: tuple[int, int] | None = None
        self._kind: tuple[object, ...] | None = None
        self._graph = Graph()

    def __call__(self, frame: av.VideoFrame) -> np.ndarray:
        if self._size is None:
            self._orientation = orientation_of(frame)
            self._size = scaled(frame.height, frame.width, self._short_side)
        # a stream may change its size or its colours on the way
        kind = (frame.width, frame.height, frame.format.name, frame.colorspace, frame.color_range)
        if kind != self._kind:
            self._kind, self._graph = kind, self._graph_for(frame, self._size)
        self._graph.push(frame)
        (plane,) = self._graph.vpull().planes
        content: Any = plane  # a buffer, which PyAV's stubs do not say
        rows = np.frombuffer(content, np.uint8).reshape(plane.height, plane.line_size)
        # a view of the frame, which lives as long; `to_ndarray` would copy it
        return self._orientation.upright(rows[:, : 3 * plane.width].reshape(plane.height, plane.width, 3))

    def _graph_for(self, frame: av.VideoFrame, size: tuple[int, int]) -> Graph:
        graph = Graph()
        if hasattr(graph, "threads"):  # PyAV before 18 has no say in it
            graph.threads = 1  # a reading process has one core
        height, width = size
        source = graph.add_buffer(
            width=frame.width, height=frame.height, format=frame.format, time_base=Fraction(1, 1000)
        )
        scale = graph.add("scale", f"{width}:{height}:flags=bicubic+full_chroma_int:interl=-1")
        rgb, sink = graph.add("format", "rgb24"), graph.add("buffersink")
        source.link_to(scale)
        scale.link_to(rgb)
        rgb.link_to(sink)
        graph.configure()
        return graph


def scaled(height: int, width: int, short_side: int | None) -> tuple[int, int]:
    """A size with this shorter side."""
    scale = 1 if short_side is None else short_side / min(height, width)
    return max(1, round(height * scale)), max(1, round(width * scale))
