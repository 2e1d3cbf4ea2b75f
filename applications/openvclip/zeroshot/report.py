"""What an evaluation found: a file, a table, a plot."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from rich.table import Table

from applications.openvclip.checkpoint import write_text
from applications.openvclip.journal import provenance

BASELINE = "CLIP*"


@dataclass(frozen=True)
class SetResult:
    """Top-1 accuracies on one set, in [0, 1]."""

    protocol: str
    closed: bool
    """Whether its classes are those of training."""
    videos: int
    classes: int
    views: int
    templates: str
    baseline: float
    """CLIP*: the pretrained image model, frame by frame."""
    along_path: dict[float, float]
    """Accuracy of the patched model by anchor weight; 0 is the fine-tuned average."""


def write_results(path: Path, results: list[SetResult], *, anchor_weight: float, config: dict[str, Any]) -> None:
    """Write the results with their protocols, configuration and provenance as JSON."""
    content = {
        "metric": "top-1 accuracy",
        "anchor_weight": anchor_weight,
        "sets": {result.protocol: asdict(result) for result in results},
        "provenance": provenance(),
        "config": config,
    }
    write_text(path, json.dumps(content, indent=2) + "\n")


def table(results: list[SetResult], anchor_weight: float) -> Table:
    """Top-1 of CLIP*, of the fine-tuned average, and of the patched model, in percent; a row for each set."""
    table = Table(
        "set", "classes", "videos", BASELINE, "fine-tuned,\nunpatched", f"Open-VCLIP,\nanchor {anchor_weight:g}"
    )
    table.title = "top-1 accuracy (%)"
    for column in table.columns[1:]:
        column.justify = "right"
    for r in results:
        name = f"{r.protocol} (trained on)" if r.closed else r.protocol
        accuracies = (r.baseline, r.along_path[0.0], r.along_path[anchor_weight])
        table.add_row(name, str(r.classes), str(r.videos), *(f"{100 * accuracy:.1f}" for accuracy in accuracies))
    return table


def plot_tradeoff(path: Path, results: list[SetResult], anchor_weight: float) -> None:
    """Draw closed-set against zero-shot accuracy along the anchor weight: a panel for each zero-shot set."""
    from matplotlib.figure import Figure  # the object interface: no display and no global state

    closed = next((r for r in results if r.closed), None)
    others = [r for r in results if not r.closed]
    if closed is None or not others:
        raise ValueError("a trade-off needs a set with the classes of training and one with others.")
    figure = Figure(figsize=(3.2 * len(others), 3.9), layout="constrained")
    for axes, other in zip(figure.subplots(1, len(others), squeeze=False)[0], others, strict=True):
        weights = sorted(other.along_path)
        x = [100 * closed.along_path[weight] for weight in weights]
        y = [100 * other.along_path[weight] for weight in weights]
        axes.plot(x, y, "o-", color="tab:blue", markersize=4, label="patched, by anchor weight")
        for weight, *point in zip(weights, x, y, strict=True):
            axes.annotate(f"{weight:g}", point, textcoords="offset points", xytext=(6, 4), fontsize=8)
        chosen = weights.index(anchor_weight)
        axes.plot(x[chosen], y[chosen], "o", color="tab:orange", markersize=9, zorder=3, label="Open-VCLIP")
        axes.plot(100 * closed.baseline, 100 * other.baseline, "*", color="black", markersize=13, label=BASELINE)
        axes.set(title=other.protocol, xlabel=f"{closed.protocol}, top-1 (%)")
        axes.margins(0.15)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("zero-shot top-1 (%)")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    with mpl.rc_context({"savefig.dpi": 150}):
        figure.savefig(path)
