"""A long video as a picture: stills above, the probabilities of its labels along time below."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure  # the object interface: no display and no global state
from matplotlib.offsetbox import AnnotationBbox, OffsetImage

from applications.openvclip.inference.windows import Segment, Timeline

_STILLS = 12
_CURVES = 6


def plot_timeline(
    path: Path | BinaryIO,
    timeline: Timeline,
    labels: Sequence[str],
    probabilities: np.ndarray,
    segments: Sequence[Segment],
) -> None:
    """Draw a video's stills, the stretches of its best labels, and the curves of the labels that matter most.

    Args:
        path: Where to, a path or an open file, as PNG.
        timeline: The windows.
        labels: K of them.
        probabilities: (W, K).
        segments: Of the same (`windows.segments`).
    """
    shown = np.argsort(-probabilities.max(axis=0), kind="stable")[:_CURVES]
    colours = {labels[k]: f"C{i}" for i, k in enumerate(shown)}
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    stills, curves = figure.subplots(2, 1, sharex=True, height_ratios=(1, 2.6))
    at = np.linspace(0, timeline.length_s, 2 * _STILLS + 1)[1::2]  # the middles of as many equal parts
    for x in at:
        picture = timeline.pictures[np.abs(timeline.middles - x).argmin()]
        image = OffsetImage(picture, zoom=58 / picture.shape[1], interpolation="antialiased")
        stills.add_artist(AnnotationBbox(image, (x, 0.5), frameon=False, pad=0))
    stills.set(ylim=(0, 1), title=Path(timeline.video).name)
    stills.set_axis_off()
    for segment in segments:
        colour = colours.get(segment.label, "0.5")
        curves.axvspan(segment.start_s, segment.end_s, color=colour, alpha=0.12, linewidth=0)
    for k in shown:
        marker = "o" if len(probabilities) < 60 else None
        colour = colours[labels[k]]
        curves.plot(timeline.middles, probabilities[:, k], color=colour, marker=marker, markersize=3, label=labels[k])
    curves.set(xlim=(0, timeline.length_s), ylim=(-0.02, 1.02), xlabel="seconds", ylabel="probability")
    curves.grid(alpha=0.3)
    figure.legend(loc="outside right center", fontsize=9, frameon=False)
    with mpl.rc_context({"savefig.dpi": 130}):
        figure.savefig(path, format="png")
