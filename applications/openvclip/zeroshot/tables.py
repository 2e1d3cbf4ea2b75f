"""Results as tables: in the terminal, as Markdown in the form of the paper's, and of several evaluations in one."""

from __future__ import annotations

from collections.abc import Mapping

from rich.table import Table

from applications.openvclip.runs.texts import markdown_table
from applications.openvclip.zeroshot.published import OTHERS, figure, published
from applications.openvclip.zeroshot.results import BASELINE, LAST, ProtocolResult, Results, mean_std, percent


def table(results: Results) -> Table:
    """CLIP*, the fine-tuned weights, and the patched model, in percent; a row for each protocol."""
    final = f"{results.anchor_weight:g}"
    table = Table("set", "classes", "videos", BASELINE, "fine-tuned,\nunpatched", f"Open-VCLIP,\nanchor {final}")
    table.title = "top-1 accuracy (%)"
    for column in table.columns[1:]:
        column.justify = "right"
    for r in results.protocols.values():
        told = [*(["trained on"] if r.closed else []), *(["mAP"] if r.multi_label else [])]
        name = f"{r.protocol} ({', '.join(told)})" if told else r.protocol
        figures = [r.text(scorer) if scorer in r.accuracy else "-" for scorer in (BASELINE, "0", final)]
        table.add_row(name, str(r.classes), str(r.videos), *figures)
    return table


def markdown(results: Results) -> str:
    """All figures, next to the published ones where the protocol is the published one; what was skipped; extremes."""
    columns = _columns(results.protocols)
    scorers = list(dict.fromkeys(s for r in results.protocols.values() for s in r.accuracy))
    rows = []
    for scorer in scorers:
        name = scorer if scorer == BASELINE else f"anchor weight {scorer}"
        if scorer.startswith(LAST):
            name = f"last weights, anchor weight {scorer.removeprefix(LAST)}"
        rows.append([_called(name, scorer, results.anchor_weight)])
        rows[-1] += [results.protocols[p].text(scorer, metric) for p, metric in columns]
    for method in (BASELINE, "fine-tuned", "Open-VCLIP"):
        figures = [published(results.protocols[p], results.model, method, metric) for p, metric in columns]
        if any(figures):
            rows.append([f"{method}, published", *(figure or "-" for figure in figures)])
    several = any(r.multi_label for r in results.protocols.values())
    lines = [
        f"# Zero-shot evaluation of {results.model}",
        "",
        "Accuracy in %, mean ± standard deviation over the parts of a protocol."
        + (" mAP: mean average precision over classes, where a video may show several." if several else ""),
        "",
        *markdown_table(["", *(f"{p}, {metric}" for p, metric in columns)], rows),
        "",
        "## Protocols",
        "",
        *markdown_table(
            ["", "hash", "parts", "classes", "videos", "unreadable", "cut off", "templates", "views"],
            [
                [
                    r.protocol,
                    f"`{r.hash}`",
                    str(len(r.parts)),
                    str(r.classes),
                    str(r.videos),
                    f"{len(r.unreadable)}, {'counted as wrong' if r.unreadable_policy == 'wrong' else 'left out'}",
                    str(len(r.cut_off)),
                    str(len(r.templates)),
                    f"{r.sampling['views']} x {r.sampling['crops']}",
                ]
                for r in results.protocols.values()
            ],
        ),
    ]
    final = f"{results.anchor_weight:g}"
    lines += _confidence(results, final)
    for r in results.protocols.values():
        if final in r.per_class and BASELINE in r.per_class:
            lines += ["", f"## Classes of {r.protocol}", "", *_changes(r, final)]
    return "\n".join(lines) + "\n"


def beside_the_published(results: Results) -> str:
    """Every figure that the paper has of this model, one's own, and the difference where the protocol is the same."""
    final = f"{results.anchor_weight:g}"
    methods = {BASELINE: BASELINE, "Open-VCLIP": final}
    rows, unlike = [], False
    for protocol, metric in _columns(results.protocols):
        r = results.protocols[protocol]
        for method, scorer in methods.items():
            if scorer not in r.accuracy:
                continue
            told, difference = figure(protocol, results.model, method, metric), "-"
            if told:
                is_other = published(r, results.model, method, metric) is None
                difference = f"{100 * r.mean_std(scorer, metric)[0] - float(told.partition('±')[0]):+.1f}"
                difference += " ?" * is_other
                unlike |= is_other
            found = r.text(scorer, metric)
            rows.append([f"{protocol}, {metric}", method, told or "-", found, difference, f"`{r.hash}`"])
    lines = markdown_table(["protocol", "", "published", "here", "difference", "hash"], rows)
    if unlike:
        lines += ["", "? The hash is not that of the published protocol: other lists, names, sentences or views."]
    model = results.model.removesuffix("-quickgelu")
    others = [[who, figures[model]] for who, figures in OTHERS.items() if model in figures]
    if others:
        lines += ["", *markdown_table(["what came after", "UCF-101 / HMDB-51 / Kinetics-600, as reported"], others)]
        lines += ["", "Each of these is under a protocol of its own, so none of them is a difference to the above."]
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
    columns = _columns({protocol: result for protocol, (_, result) in seen.items()})
    rows = []
    for name, found in named.items():
        for scorer in dict.fromkeys(s for r in found.protocols.values() for s in r.accuracy):
            figures = [found.protocols[p].text(scorer, m) if p in found.protocols else "-" for p, m in columns]
            rows.append([name, found.model, scorer, *figures])
    return "\n".join(markdown_table(["", "model", "anchor weight", *(f"{p}, {metric}" for p, metric in columns)], rows))


def _confidence(results: Results, scorer: str) -> list[str]:
    """How sure the answers are of the final model, where older results tell."""
    columns = {
        "ece": "calibration error",
        "ece_calibrated": "calibrated",
        "accuracy_at_95": "accuracy at 95 % coverage",
        "auroc": "AUROC of labels against none of these",
    }
    rows = []
    for r in results.protocols.values():
        if found := r.confidence.get(scorer):
            figures = [percent(*mean_std(found[c]), parts=len(r.parts)) if c in found else "-" for c in columns]
            rows.append([r.protocol, *figures])
    header = ["", *columns.values()]
    return ["", f"## Confidence at anchor weight {scorer}, in %", "", *markdown_table(header, rows)] if rows else []


def _unlike(a: ProtocolResult, b: ProtocolResult) -> list[str]:
    """In what two protocols differ, as far as results tell."""
    told = ("classes", "videos", "parts", "top_k", "templates", "sampling", "unreadable_policy", "multi_label")
    unlike = []
    for field in told:
        mine, its = (getattr(result, field) for result in (a, b))
        if mine != its:
            values = f"{mine} and {its}"
            unlike.append(field if len(values) > 200 else f"{field} {values}")
    return unlike or [f"hash {a.hash} and {b.hash}"]


def _columns(protocols: Mapping[str, ProtocolResult]) -> list[tuple[str, str]]:
    return [(protocol, metric) for protocol, result in protocols.items() for metric in result.metrics]


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
    return markdown_table(["class", BASELINE, f"anchor weight {scorer}"], rows)
