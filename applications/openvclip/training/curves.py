"""The journal of training as a picture; a program of its own, so that drawing never holds up training.

$ python -m applications.openvclip.training.curves runs/…/journal.jsonl curves.png
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # the object interface: no display and no global state

from applications.openvclip.runs.journal import read_journal

_BINS = 100
"""Points of a curve: each is the mean of the steps around it, in a band from the least to the greatest of them."""

_PANELS: dict[str, dict[str, str]] = {
    "loss": {"loss": "at theta", "interpolated_loss": "at interpolated weights"},
    "gradient norm, before clipping": {"gradient_norm": "gradient norm"},
    "distance from the anchor": {"distance": "distance"},
    "learning rate": {"learning_rate": "learning rate"},
    "clips a second": {"clips_per_s": "clips a second"},
}


def draw(journal: Path, picture: Path) -> None:
    """Draw losses, gradient norm, distance, learning rate, speed and evaluations; dotted where a run was resumed."""
    events = read_journal(journal)
    steps = [event | event.get("machine", {}) for event in events if event["event"] == "step"]
    evaluations = [event for event in events if event["event"] == "evaluation"]
    resumed = sorted(set(_resumed(events)))
    panels = {title: {n: t for n, t in lines.items() if any(n in s for s in steps)} for title, lines in _PANELS.items()}
    panels = {title: lines for title, lines in panels.items() if lines}
    titles = [*panels, *(("accuracy (%)",) if evaluations else ())]
    figure, grid = _grid(len(titles))
    for axes, title in zip(grid, titles, strict=False):
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.25)
        axes.tick_params(labelsize=8)
        for i, (name, label) in enumerate(panels.get(title, {}).items()):
            _curve(axes, [(s["step"], s[name]) for s in steps if name in s], f"C{i}", label)
        if title not in panels:
            _accuracies(axes, evaluations)
        if "gradient_norm" in panels.get(title, {}) and any(s.get("gradient_norm", 0) > 0 for s in steps):
            axes.set_yscale("log")
        if "clips_per_s" in panels.get(title, {}):
            durations = [1 / s["clips_per_s"] for s in steps if "waiting" in s]
            waiting = np.average([s["waiting"] for s in steps if "waiting" in s], weights=durations)
            axes.set_title(f"{title}; {waiting:.0%} of the time waiting for data", fontsize=10)
            axes.set_ylim(0, 1.2 * float(np.max(axes.lines[0].get_ydata())))  # the mean: a short step is no news
        for i, step in enumerate(resumed):
            axes.axvline(step + 0.5, color="0.5", linestyle=":", linewidth=1, label="resumed" if not i else None)
        if len(panels.get(title, "..")) > 1 or (resumed and axes is grid[0]):
            axes.legend(fontsize=7, framealpha=0.6)
    for axes in grid[len(titles) :]:
        axes.set_axis_off()
    last = f"step {steps[-1]['step']}" if steps else "no step yet"
    figure.suptitle(f"{journal.resolve().parent.name}, {last}", fontsize=10)
    temporary = picture.with_name(f".{picture.name}")
    figure.savefig(temporary, dpi=110, format="png")
    temporary.replace(picture)  # who looks at it sees the old one or the new one


def _grid(n: int) -> tuple[Figure, Sequence[Axes]]:
    """So many panels; their margins are given, as having them found takes as long as the drawing."""
    columns = min(3, max(1, n))
    rows = max(1, -(-n // columns))
    width, height = 4.4 * columns, 0.5 + 2.9 * rows
    figure = Figure(figsize=(width, height))
    figure.subplots_adjust(
        left=0.6 / width, right=1 - 0.2 / width, bottom=0.35 / height, top=1 - 0.65 / height, wspace=0.16, hspace=0.24
    )
    return figure, np.ravel(figure.subplots(rows, columns, squeeze=False)).tolist()


def _resumed(events: list[dict[str, Any]]) -> Iterator[int]:
    """The steps after which a process went on that did not take them: the journal's order tells, as it was cut."""
    step = 0
    for event in events:
        if event["event"] == "step":
            step = event["step"]
        elif event["event"] == "start" and step:
            yield step


def _curve(axes: Axes, points: list[tuple[int, float]], colour: str, label: str) -> None:
    """The mean of neighbouring steps, in a band that reaches from the least to the greatest."""
    bins = np.array_split(np.asarray(points, dtype=float), min(_BINS, len(points)))
    x = [part[:, 0].mean() for part in bins]
    low, mean, high = ([f(part[:, 1]) for part in bins] for f in (np.min, np.mean, np.max))
    axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
    axes.plot(x, mean, color=colour, linewidth=1.4, label=label, marker="." if len(x) == 1 else None)


def _accuracies(axes: Axes, evaluations: list[dict[str, Any]]) -> None:
    """A colour for each set, a line for each anchor weight: the chosen one strong, others faint, CLIP* dashed."""
    for i, name in enumerate(dict.fromkeys(name for event in evaluations for name in event["accuracy"])):
        found = [(event, event["accuracy"][name]) for event in evaluations if name in event["accuracy"]]
        chosen = f"{found[-1][0]['anchor_weight']:g}"
        for weight in dict.fromkeys(weight for _, accuracy in found for weight in accuracy):
            points = [(event["step"], 100 * accuracy[weight]) for event, accuracy in found if weight in accuracy]
            x, y = zip(*points, strict=True)
            if weight == chosen:
                label = f"{name}, anchor weight {weight}"
                axes.plot(x, y, "o-", color=f"C{i}", linewidth=1.6, markersize=3, label=label)
            else:
                axes.plot(x, y, "-" if weight[0].isdigit() else "--", color=f"C{i}", linewidth=0.8, alpha=0.35)


if __name__ == "__main__":
    if hasattr(os, "nice"):
        os.nice(10)
    draw(Path(sys.argv[1]), Path(sys.argv[2]))
