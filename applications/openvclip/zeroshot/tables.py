"""What an evaluation found: figures, tables in the form of the paper's, a plot."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cattrs
import matplotlib as mpl
import numpy as np
import torch
from rich.table import Table

from applications.openvclip import metrics
from applications.openvclip.checkpoint import write_text
from applications.openvclip.journal import provenance
from applications.openvclip.zeroshot.evaluator import Pass
from applications.openvclip.zeroshot.logits import LogitFiles
from applications.openvclip.zeroshot.protocols import Protocol
from applications.openvclip.zeroshot.published import published

BASELINE = "CLIP*"


@dataclass(frozen=True)
class ProtocolResult:
    """Accuracies under one protocol, in [0, 1], of CLIP* and of each anchor weight ("0" is the fine-tuned weights)."""

    protocol: str
    hash: str
    closed: bool
    """Whether its classes are those of training."""
    videos: int
    """Different ones, over all parts."""
    classes: int
    """Different ones, over all parts."""
    parts: list[str]
    top_k: list[int]
    templates: list[str]
    sampling: dict[str, Any]
    unreadable_policy: str
    unreadable: dict[str, str]
    """Why videos could not be read, by location."""
    accuracy: dict[str, dict[str, list[float]]]
    """By scorer, then by "top-1" and the like: of each part."""
    per_class: dict[str, dict[str, float]]
    """By scorer, then by class: top-1 over the videos of the class in all parts."""

    def mean_std(self, scorer: str, k: int = 1) -> tuple[float, float]:
        """Mean and standard deviation over the parts."""
        return metrics.mean_std(self.accuracy[scorer][f"top-{k}"])

    def text(self, scorer: str, k: int = 1) -> str:
        """In percent, as the paper prints it: "87.1±2.4", or "79.5" where there is one part."""
        return percent(*self.mean_std(scorer, k), parts=len(self.parts))


def percent(mean: float, std: float, *, parts: int) -> str:
    return f"{100 * mean:.1f}±{100 * std:.1f}" if parts > 1 else f"{100 * mean:.1f}"


def result_of(protocol: Protocol, one: Pass, files: LogitFiles) -> ProtocolResult:
    """The accuracies of a protocol: a selection of rows and columns of the logits of its pass.

    Raises:
        ValueError: No video of a part could be read, and unreadable ones are to be left out.
    """
    row = {location: i for i, location in enumerate(one.videos)}
    column = {name: i for i, name in enumerate(one.classes)}
    logits = torch.from_numpy(files.read()).sum(dim=2)  # (videos, scorers, classes): views are added
    reasons = files.unreadable()
    scorers: list[str] = files.content["scorers"]
    accuracy = {scorer: {f"top-{k}": [] for k in protocol.top_k} for scorer in scorers}
    answers: dict[str, list[tuple[torch.Tensor, list[str]]]] = {scorer: [] for scorer in scorers}
    videos: set[str] = set()
    for part in protocol.parts:
        locations = [part.location(i) for i in range(len(part))]
        videos.update(locations)
        kept = [i for i, at in enumerate(locations) if protocol.unreadable == "wrong" or row[at] not in reasons]
        if not kept:
            raise ValueError(f"{protocol.name}, {part.name}: none of its {len(part)} videos could be read.")
        rows = torch.tensor([row[locations[i]] for i in kept])
        columns = torch.tensor([column[name] for name in part.classes])
        labels = torch.tensor([part.labels[i] for i in kept])
        for s, scorer in enumerate(scorers):
            selected = logits[rows, s][:, columns]
            for k in protocol.top_k:
                accuracy[scorer][f"top-{k}"].append(metrics.top_k_accuracy(selected, labels, k))
            correct = metrics.top_k_correct(selected, labels)
            answers[scorer].append((correct, [part.classes[i] for i in labels.tolist()]))
    return ProtocolResult(
        protocol=protocol.name,
        hash=protocol.hash,
        closed=protocol.closed,
        videos=len(videos),
        classes=len({name for part in protocol.parts for name in part.classes}),
        parts=[part.name for part in protocol.parts],
        top_k=list(protocol.top_k),
        templates=list(protocol.templates),
        sampling=asdict(protocol.sampling),
        unreadable_policy=protocol.unreadable,
        unreadable={at: reasons[row[at]] for at in sorted(videos) if row[at] in reasons},
        accuracy=accuracy,
        per_class={scorer: _per_class(found) for scorer, found in answers.items()},
    )


def _per_class(answers: Sequence[tuple[torch.Tensor, list[str]]]) -> dict[str, float]:
    correct = torch.cat([correct for correct, _ in answers])
    shown = [name for _, names in answers for name in names]
    classes = sorted(set(shown))
    index = {name: i for i, name in enumerate(classes)}
    labels = torch.tensor([index[name] for name in shown])
    return dict(zip(classes, metrics.per_class_accuracy(correct, labels, len(classes)).tolist(), strict=True))


@dataclass(frozen=True)
class Results:
    """The results of one evaluation, as they are in `results.json`."""

    model: str
    """Name of the image model."""
    anchor_weight: float
    """Of the final model."""
    protocols: dict[str, ProtocolResult]
    provenance: dict[str, Any]
    config: dict[str, Any]


def results(model: str, anchor_weight: float, found: Sequence[ProtocolResult], config: dict[str, Any]) -> Results:
    return Results(model, anchor_weight, {result.protocol: result for result in found}, provenance(), config)


def write_results(path: Path, results: Results) -> None:
    write_text(path, json.dumps({"metric": "accuracy", **asdict(results)}, indent=2) + "\n")


def read_results(path: Path) -> Results:
    """What `write_results` wrote."""
    content = json.loads(path.read_text(encoding="utf-8"))
    content.pop("metric")
    return cattrs.Converter(forbid_extra_keys=True).structure(content, Results)


def table(results: Results) -> Table:
    """CLIP*, the fine-tuned weights, and the patched model, in percent; a row for each protocol."""
    final = f"{results.anchor_weight:g}"
    table = Table("set", "classes", "videos", BASELINE, "fine-tuned,\nunpatched", f"Open-VCLIP,\nanchor {final}")
    table.title = "top-1 accuracy (%)"
    for column in table.columns[1:]:
        column.justify = "right"
    for r in results.protocols.values():
        name = f"{r.protocol} (trained on)" if r.closed else r.protocol
        figures = [r.text(scorer) if scorer in r.accuracy else "-" for scorer in (BASELINE, "0", final)]
        table.add_row(name, str(r.classes), str(r.videos), *figures)
    return table


def markdown(results: Results) -> str:
    """All figures, next to the published ones where the protocol is the published one; what was skipped; extremes."""
    columns = _columns({r.protocol: r.top_k for r in results.protocols.values()})
    scorers = list(dict.fromkeys(s for r in results.protocols.values() for s in r.accuracy))
    rows = []
    for scorer in scorers:
        name = scorer if scorer == BASELINE else f"anchor weight {scorer}"
        rows.append([_called(name, scorer, results.anchor_weight)])
        rows[-1] += [results.protocols[p].text(scorer, k) for p, k in columns]
    for method in (BASELINE, "fine-tuned", "Open-VCLIP"):
        figures = [published(results.protocols[p], results.model, method, k) for p, k in columns]
        if any(figures):
            rows.append([f"{method}, published", *(figure or "-" for figure in figures)])
    lines = [
        f"# Zero-shot evaluation of {results.model}",
        "",
        "Accuracy in %, mean ± standard deviation over the parts of a protocol.",
        "",
        *_markdown_table(["", *(f"{p}, top-{k}" for p, k in columns)], rows),
        "",
        "## Protocols",
        "",
        *_markdown_table(
            ["", "hash", "parts", "classes", "videos", "unreadable", "templates", "views"],
            [
                [
                    r.protocol,
                    f"`{r.hash}`",
                    str(len(r.parts)),
                    str(r.classes),
                    str(r.videos),
                    f"{len(r.unreadable)}, {'counted as wrong' if r.unreadable_policy == 'wrong' else 'left out'}",
                    str(len(r.templates)),
                    f"{r.sampling['views']} x {r.sampling['crops']}",
                ]
                for r in results.protocols.values()
            ],
        ),
    ]
    final = f"{results.anchor_weight:g}"
    for r in results.protocols.values():
        if final in r.per_class and BASELINE in r.per_class:
            lines += ["", f"## Classes of {r.protocol}", "", *_changes(r, final)]
    return "\n".join(lines) + "\n"


def compare(named: Mapping[str, Results]) -> str:
    """A Markdown table of several evaluations, by name.

    Raises:
        ValueError: A protocol of the same name is not the same protocol in two of them.
    """
    seen: dict[str, tuple[str, ProtocolResult]] = {}
    for name, found in named.items():
        for protocol, result in found.protocols.items():
            other, first = seen.setdefault(protocol, (name, result))
            if result.hash != first.hash:
                raise ValueError(
                    f"{protocol} is not the same in {other} and {name}: {'; '.join(_unlike(first, result))}. Their "
                    "figures do not belong in one table; evaluate one of them again under the other's protocol."
                )
    columns = _columns({protocol: result.top_k for protocol, (_, result) in seen.items()})
    rows = []
    for name, found in named.items():
        for scorer in dict.fromkeys(s for r in found.protocols.values() for s in r.accuracy):
            figures = [found.protocols[p].text(scorer, k) if p in found.protocols else "-" for p, k in columns]
            rows.append([name, found.model, scorer, *figures])
    return "\n".join(_markdown_table(["", "model", "anchor weight", *(f"{p}, top-{k}" for p, k in columns)], rows))


def _unlike(a: ProtocolResult, b: ProtocolResult) -> list[str]:
    """In what two protocols differ, as far as results tell."""
    told = ("classes", "videos", "parts", "top_k", "templates", "sampling", "unreadable_policy")
    unlike = []
    for field in told:
        mine, its = (getattr(result, field) for result in (a, b))
        if mine != its:
            values = f"{mine} and {its}"
            unlike.append(field if len(values) > 200 else f"{field} {values}")
    return unlike or [f"hash {a.hash} and {b.hash}"]


def _columns(top_k: Mapping[str, Sequence[int]]) -> list[tuple[str, int]]:
    return [(protocol, k) for protocol, ks in top_k.items() for k in ks]


def _called(name: str, scorer: str, anchor_weight: float) -> str:
    if scorer == "0":
        return f"{name} (fine-tuned)"
    return f"**{name} (Open-VCLIP)**" if scorer == f"{anchor_weight:g}" else name


def _changes(r: ProtocolResult, scorer: str, n: int = 5) -> list[str]:
    """The classes that gained and lost most over CLIP*; all of them are in results.json."""
    gains = {name: r.per_class[scorer][name] - r.per_class[BASELINE][name] for name in r.per_class[scorer]}
    order = sorted(gains, key=lambda name: -gains[name])
    chosen = order if len(order) <= 2 * n else [*order[:n], *order[-n:]]
    rows = [[name, *(f"{100 * r.per_class[s][name]:.1f}" for s in (BASELINE, scorer))] for name in chosen]
    return _markdown_table(["class", BASELINE, f"anchor weight {scorer}"], rows)


def _markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]


def plot_tradeoff(path: Path, results: Results) -> None:
    """Draw closed-set against zero-shot accuracy along the anchor weight: a panel for each zero-shot protocol."""
    from matplotlib.figure import Figure  # the object interface: no display and no global state

    closed = next((r for r in results.protocols.values() if r.closed), None)
    others = [r for r in results.protocols.values() if not r.closed]
    if closed is None or not others:
        raise ValueError("a trade-off needs a set with the classes of training and one with others.")
    columns = min(4, len(others))
    shape = (-(-len(others) // columns), columns)
    figure = Figure(figsize=(3.2 * shape[1], 0.5 + 3.4 * shape[0]), layout="constrained")
    weights = sorted((s for s in closed.accuracy if s != BASELINE), key=float)
    x = [100 * closed.mean_std(weight)[0] for weight in weights]
    for axes, other in zip(np.ravel(figure.subplots(*shape, squeeze=False)), others, strict=False):
        y = [100 * other.mean_std(weight)[0] for weight in weights]
        axes.plot(x, y, "o-", color="tab:blue", markersize=4, label="patched, by anchor weight")
        for weight, *point in zip(weights, x, y, strict=True):
            axes.annotate(weight, point, textcoords="offset points", xytext=(6, 4), fontsize=8)
        chosen = weights.index(f"{results.anchor_weight:g}")
        axes.plot(x[chosen], y[chosen], "o", color="tab:orange", markersize=9, zorder=3, label="Open-VCLIP")
        baseline = [100 * r.mean_std(BASELINE)[0] for r in (closed, other)]
        axes.plot(*baseline, "*", color="black", markersize=13, label=BASELINE)
        axes.set(title=other.protocol, xlabel=f"{closed.protocol}, top-1 (%)")
        axes.margins(0.15)
        axes.grid(alpha=0.3)
    for axes in figure.axes[len(others) :]:
        axes.set_axis_off()
    figure.axes[0].set_ylabel("zero-shot top-1 (%)")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    with mpl.rc_context({"savefig.dpi": 150}):
        figure.savefig(path)
