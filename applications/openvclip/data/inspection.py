"""What is in a data set: counts, lengths, frame rates, and which files can't be read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from applications.openvclip.data.decode import Stream, VideoReadError
from applications.openvclip.data.manifest import Manifest
from applications.openvclip.data.storage import Cache
from applications.openvclip.data.views import opened
from applications.openvclip.data.workers import Workers


@dataclass(frozen=True)
class LookAt:
    """Opens a video and decodes its last frame, which a file cut short does not have: location → what it is."""

    cache: Cache

    def __call__(self, location: str) -> Stream:
        with opened(location, self.cache) as video:
            video.chosen(lambda n, _: [n - 1])
            return video.stream


@dataclass(frozen=True)
class Inspection:
    """What was found."""

    manifest: Manifest
    streams: dict[int, Stream]
    """Of each readable video, by its index."""
    unreadable: dict[int, str]
    """Why a video can't be read, by its index."""

    def lines(self) -> list[str]:
        """The findings as lines of text."""
        m = self.manifest
        per_class = np.bincount(m.labels, minlength=len(m.classes))
        cut_off = {i: stream.shortfall for i, stream in self.streams.items() if stream.shortfall}
        lines = [
            f"{m.name}: {len(m)} videos of {len(m.classes)} classes in {m.root}",
            f"videos of a class: {per_class.min()} to {per_class.max()}, median {np.median(per_class):g}",
            f"unreadable: {len(self.unreadable)}",
            *(f"  {reason}" for reason in self.unreadable.values()),
            f"cut off, and used as far as they go: {len(cut_off)}",
            *(f"  {m.location(i)}: {missing}" for i, missing in cut_off.items()),
        ]
        if self.streams:
            streams = self.streams.values()
            seconds = [s.frames / s.frames_per_second for s in streams]
            lines += [
                f"frames: {_spread([s.frames for s in streams])}",
                f"seconds: {_spread(seconds)}",
                f"frame rates: {_counts([f'{s.frames_per_second:.4g}' for s in streams])}",
                f"frame sizes: {_counts(['{1}x{0}'.format(*s.upright_size) for s in streams])}",
                f"codecs: {_counts([s.codec for s in streams])}",
            ]
        return lines


def inspect(
    manifest: Manifest, *, workers: int, time_limit_s: float, cache: Cache, advance: Callable[[], object] = lambda: None
) -> Inspection:
    """Open every video of a manifest, each under a time limit."""
    streams, unreadable = {}, {}
    locations = [manifest.location(i) for i in range(len(manifest))]
    with Workers(LookAt(cache), workers, time_limit_s) as pool:
        for i, found in enumerate(pool.map(locations)):
            if isinstance(found, VideoReadError):
                unreadable[i] = str(found)
            else:
                streams[i] = found
            advance()
    return Inspection(manifest, streams, unreadable)


def _spread(values: list) -> str:
    return f"{min(values):.4g} to {max(values):.4g}, median {np.median(values):.4g}"


def _counts(values: list[str]) -> str:
    common = Counter(values).most_common(8)
    rest = len(set(values)) - len(common)
    return ", ".join(f"{value} ({count})" for value, count in common) + (f", and {rest} more" if rest else "")
