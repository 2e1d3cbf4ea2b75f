"""Results as a picture: what the closed set gains, and what the open vocabulary keeps, along the anchor weight."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure  # the object interface: no display and no global state

from applications.openvclip.zeroshot.results import BASELINE, LAST, Results


def plot_tradeoff(path: Path, results: Results) -> None:
    """Draw closed-set against zero-shot accuracy along the anchor weight: a panel for each zero-shot protocol.

    The image's metadata, `Description`, is the data that it was drawn from.
    """
    closed = next((r for r in results.protocols.values() if r.closed), None)
    others = [r for r in results.protocols.values() if not r.closed]
    if closed is None or not others:
        raise ValueError("a trade-off needs a set with the classes of training and one with others.")
    columns = min(4, len(others))
    shape = (-(-len(others) // columns), columns)
    figure = Figure(figsize=(3.2 * shape[1], 0.5 + 3.4 * shape[0]), layout="constrained")
    weights = sorted((s for s in closed.accuracy if s != BASELINE and not s.startswith(LAST)), key=float)
    x = [100 * closed.mean_std(weight)[0] for weight in weights]
    last = [f"{LAST}{weight}" for weight in weights if f"{LAST}{weight}" in closed.accuracy]
    for axes, other in zip(np.ravel(figure.subplots(*shape, squeeze=False)), others, strict=False):
        y = [100 * other.mean_std(weight)[0] for weight in weights]
        if last:
            unaveraged = [[100 * r.mean_std(scorer)[0] for scorer in last] for r in (closed, other)]
            axes.plot(*unaveraged, ".--", color="tab:gray", markersize=4, linewidth=1, label="without averaging")
        axes.plot(x, y, "o-", color="tab:blue", markersize=4, label="patched, by anchor weight")
        for weight, *point in zip(weights, x, y, strict=True):
            axes.annotate(weight, point, textcoords="offset points", xytext=(6, 4), fontsize=8)
        chosen = weights.index(f"{results.anchor_weight:g}")
        axes.plot(x[chosen], y[chosen], "o", color="tab:orange", markersize=9, zorder=3, label="Open-VCLIP")
        baseline = [100 * r.mean_std(BASELINE)[0] for r in (closed, other)]
        axes.plot(*baseline, "*", color="black", markersize=13, label=BASELINE)
        axes.set(title=other.protocol, xlabel=f"{closed.protocol}, {closed.metrics[0]} (%)")
        axes.margins(0.15)
        axes.grid(alpha=0.3)
    for axes in figure.axes[len(others) :]:
        axes.set_axis_off()
    metrics = " or ".join(dict.fromkeys(r.metrics[0] for r in others))
    figure.axes[0].set_ylabel(f"zero-shot {metrics} (%)")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    with mpl.rc_context({"savefig.dpi": 150}):
        figure.savefig(path, metadata={"Description": drawn_from(results)})


def drawn_from(results: Results) -> str:
    """The figures of a trade-off, as JSON."""
    figures = {name: r.accuracy for name, r in results.protocols.items()}
    return json.dumps({"anchor_weight": results.anchor_weight, "accuracy": figures}, sort_keys=True)
