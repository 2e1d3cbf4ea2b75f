"""The study as a page: tables and figures in the form of the paper's, and what became of each claim."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, median

from matplotlib.figure import Figure

from applications.openvclip.runs.texts import markdown_table, write_text
from applications.openvclip.zeroshot.results import BASELINE
from benchmarks.study.analysis import Curve, Estimate, estimate, front, gaps, overlap, paired, verdict
from benchmarks.study.findings import Findings
from benchmarks.study.methods import CLAIMS, PATCH, ROWS, SETS, VARIATIONS, ZERO_SHOT, Claim, Row, claims_of

COLUMNS = ("closed", "zero-shot", *SETS[1:])
TABLE_4 = ("fine-tuning", "fine-tuning + patch", "IWR + patch", "SWA + patch", "IWR + SWA + patch")
TABLE_5 = ("fine-tuning + patch", "l2 + patch", "l2 + SWA + patch", "IWR + SWA + patch")
FIGURE_2 = ("fine-tuning + patch", "IWR + patch", "SWA + patch", "IWR + SWA + patch")
FIGURE_3 = ("IWR + SWA + patch",)
CLAIMS_OF_METHODS = (*CLAIMS, *(claim for v in VARIATIONS if v.instead_of is None for claim in claims_of(v)))
BY_NAME = {row.name: row for row in ROWS}
TERMS = """\
*Closed*: accuracy on the classes that were trained on; *zero-shot*: on others, by name. *CLIP\\**: the pretrained
model, frame by frame, and with attention over neighbouring frames (*temporal*). *Patched*: mixed with the pretrained
weights, half of each; the *curve* is all such mixtures. *IWR*: the loss at mixed weights is trained on too. *SWA*:
the weights are a mean along training. *l2*: a penalty on the distance from the pretrained weights. *Teacher*: the
loss holds the model near an average of itself, exponential (EMA) or plain (mean). *Split* and *random*: IWR in one
pass, on half of a batch or at random. *Out of context*: classes that were trained on, before a background of another
class."""
HOW_CLAIMS_ARE_JUDGED = """\
How much more zero-shot accuracy one curve has than another: the mean over the closed-set accuracies that both reach,
paired by seed; in brackets its 95 % interval, by Student's t over seeds. *Held*: the bracket is above 0; *not held*:
below, so the other way round; *within noise*: around it. Of twenty claims with nothing behind them one would be held
or not held by chance. A method that does not get far is compared only as far as it gets, and not at all where with
some seed it ends before the other begins. Beside it the differences at the one anchor weight, where a method that
only slides along the curve looks like one that lifts it.

The recipe was chosen, with other seeds, so that all parts of the paper's method can be seen; no setting is tuned for
any other. The EMA teacher has the decay that it was published with, for runs many times as long: in the 270 steps
here it hardly leaves CLIP, and the mean as a teacher is the fairer comparison."""

OTHERWISE = """\
Not what claims are judged by, and chosen after they had been: with so many figures some brackets leave 0 out by
chance. *At least as much closed*: the same, with each curve's rising part raised to its peak, because nobody would
choose a point that has less of both. Then the accuracies that zero-shot is the mean of, one by one, and what the
model knew before (*images*)."""
CONDITIONS = """\
The claims about the paper's methods, l2 and the mean as a teacher once more: where the learning rate decays to zero
along a cosine, and where training has 16 videos of each class, for six epochs."""
SETTINGS = """\
The recipe with one setting changed, beside the recipe as it is; and claims about methods where all have what was
changed."""


def write(findings: Findings, folder: Path) -> None:
    """`report.md`, `figure-2.png` and `figure-3.png`."""
    there = [row for row in ROWS if findings.of(row.training)]
    figure(findings, _there(FIGURE_2, there), ("zero-shot",)).savefig(folder / "figure-2.png", dpi=150)
    figure(findings, _there(FIGURE_3, there), SETS[1:]).savefig(folder / "figure-3.png", dpi=150)
    write_text(folder / "report.md", markdown(findings))


def markdown(findings: Findings) -> str:
    there = [row for row in ROWS if findings.of(row.training)]
    return (
        "\n\n".join(
            [
                "# The method in miniature",
                summary(findings, _judged(CLAIMS, there)),
                made_of(findings),
                TERMS,
                "## Claims, at equal closed-set accuracy",
                HOW_CLAIMS_ARE_JUDGED,
                claims(findings, _judged(CLAIMS, there)),
                resolution(findings, _judged(CLAIMS, there)),
                "## What each part adds (the paper's Table 4)",
                table(findings, _there(TABLE_4, there)),
                "## Beside the l2 penalty (the paper's Table 5)",
                table(findings, _there(TABLE_5, there)),
                "## Closed-set and zero-shot accuracy (the paper's Figure 2)",
                "![Closed-set and zero-shot accuracy along the anchor weight](figure-2.png)",
                "## Along the anchor weight (the paper's Figure 3)",
                "![Each set along the anchor weight](figure-3.png)",
                *varied(findings, there),
                "## The claims looked at otherwise",
                OTHERWISE,
                otherwise(findings, _judged(CLAIMS_OF_METHODS, there)),
                "## All rows",
                table(findings, there),
            ]
        )
        + "\n"
    )


def summary(findings: Findings, of: Sequence[Claim]) -> str:
    """How many claims became what, and which were settled."""
    texts: dict[str, list[str]] = {}
    for claim in of:
        texts.setdefault(verdict(_gaps(findings, claim, "zero-shot")), []).append(claim.text)
    said = [f"{len(texts[v])} {v}: {'; '.join(texts[v])}." for v in ("held", "not held") if v in texts]
    said += [f"{len(texts[v])} {v}." for v in texts if v not in ("held", "not held")]
    return f"Of {len(of)} claims, at equal closed-set accuracy: {' '.join(said)}"


def made_of(findings: Findings) -> str:
    p = findings.provenance
    versions = ", ".join(f"{name} {version}" for name, version in p["versions"].items())
    commits = ", ".join(dict.fromkeys(f"{c[:12]}{'-dirty' * c.endswith('-dirty')}" for c in p["commits of the runs"]))
    return (
        f"Top-1 in %, mean ± standard deviation over the seeds {', '.join(map(str, findings.seeds))}. Zero-shot is the "
        f"mean of {', '.join(ZERO_SHOT)}; patched rows have an anchor weight of {PATCH:g}. Runs of the commits "
        f"{commits}, with {versions}, on {p['hardware'].get('cores')} cores, a thread for each run."
    )


def _there(names: Iterable[str], rows: Sequence[Row]) -> list[Row]:
    return [BY_NAME[name] for name in names if BY_NAME[name] in rows]


def table(findings: Findings, rows: Sequence[Row]) -> str:
    """The untrained models and the given rows, under every set."""
    untrained = [(f"{BASELINE}, per frame", BASELINE), (f"{BASELINE}, temporal", "1")]
    lines = [[name, *(findings.baseline(scorer, c) for c in COLUMNS)] for name, scorer in untrained]
    lines += [[row.name, *(findings.values(row, c) for c in COLUMNS)] for row in rows]
    cells = [
        [name + _fewer(found[0], findings), *(_mean_std(estimate(list(values.values()))) for values in found)]
        for name, *found in lines
    ]
    return "\n".join(markdown_table(("method", *COLUMNS), cells))


def varied(findings: Findings, there: Sequence[Row]) -> list[str]:
    """Sections on the claims under other conditions and with other settings, as far as there are runs."""
    conditions = [v for v in VARIATIONS if v.instead_of is None]
    settings = [v for v in VARIATIONS if v.instead_of is not None]
    sections = []
    for title, introduction, variations in (
        ("## With another schedule, with fewer videos", CONDITIONS, conditions),
        ("## With other settings", SETTINGS, settings),
    ):
        if found := _judged([claim for v in variations for claim in claims_of(v)], there):
            sections += [title, introduction, claims(findings, found)]
    return sections


def _judged(claims: Sequence[Claim], there: Sequence[Row]) -> list[Claim]:
    """Those of which both methods are there."""
    names = {row.name for row in there}
    return [claim for claim in claims if {claim.better, claim.worse} <= names]


def resolution(findings: Findings, of: Sequence[Claim]) -> str:
    """How small a difference the study can see, by these claims."""
    compared = [_gaps(findings, claim, "zero-shot") for claim in of]
    widths = [gap.high - gap.low for gap in compared if gap]
    if not widths:
        return "No methods could be compared."
    return (
        f"The median bracket is ± {100 * median(widths) / 2:.1f} points: methods that differ by less, the miniature "
        "does not tell apart with so many seeds."
    )


def otherwise(findings: Findings, of: Sequence[Claim]) -> str:
    """The gaps of claims between the curves' fronts, and on each set."""
    lines = []
    for claim in of:
        better, worse = BY_NAME[claim.better], BY_NAME[claim.worse]
        fronts = ({seed: front(curve) for seed, curve in findings.curves(row).items()} for row in (better, worse))
        of_sets = (_gaps(findings, claim, measure) for measure in (*ZERO_SHOT, "images"))
        text = claim.text + _fewer(_common(findings, better, worse), findings)
        lines.append([text, *map(_difference, (gaps(*fronts), *of_sets))])
    return "\n".join(markdown_table(("claim", "at least as much closed", *ZERO_SHOT, "images"), lines))


def claims(findings: Findings, of: Sequence[Claim]) -> str:
    """What became of claims."""
    lines = []
    for claim in of:
        better, worse = BY_NAME[claim.better], BY_NAME[claim.worse]
        at_equal = {measure: _gaps(findings, claim, measure) for measure in ("zero-shot", *SETS[-1:])}
        fixed = [paired(findings.values(better, m), findings.values(worse, m)) for m in ("closed", "zero-shot")]
        cells = (_difference(e) for e in (*at_equal.values(), *fixed))
        where = _overlap(findings.curves(better), findings.curves(worse))
        text = claim.text + _fewer(_common(findings, better, worse), findings)
        lines.append([text, f"**{verdict(at_equal['zero-shot'])}**", where, *cells])
    head = ("claim", "", "compared at closed", "zero-shot, equal closed", "out of context, equal closed")
    return "\n".join(markdown_table((*head, f"closed at {PATCH:g}", f"zero-shot at {PATCH:g}"), lines))


def _gaps(findings: Findings, claim: Claim, measure: str) -> Estimate | None:
    return gaps(*(findings.curves(BY_NAME[name], measure) for name in (claim.better, claim.worse)))


def _common(findings: Findings, a: Row, b: Row) -> Collection[int]:
    return findings.of(a.training).keys() & findings.of(b.training).keys()


def _fewer(seeds: Collection[int], findings: Findings) -> str:
    return f" ({len(seeds)} seed{'s' * (len(seeds) > 1)})" if len(seeds) < len(findings.seeds) else ""


def _mean_std(e: Estimate) -> str:
    return f"{100 * e.mean:.1f}" + f" ± {100 * e.std:.1f}" * (e.n > 1)


def _overlap(a: Mapping[int, Curve], b: Mapping[int, Curve]) -> str:
    """From where to where curves are compared, the mean over seeds."""
    seeds = a.keys() & b.keys()
    ranges = [found for seed in seeds if (found := overlap(a[seed], b[seed]))]
    text = " to ".join(f"{100 * fmean(ends):.0f}" for ends in zip(*ranges, strict=True)) or "-"
    return text if len(ranges) in (0, len(seeds)) else f"{text}, {len(ranges)} of {len(seeds)} seeds"


def _difference(e: Estimate | None) -> str:
    if e is None:
        return "-"
    return f"{100 * e.mean:+.1f}" + f" [{100 * e.low:+.1f}, {100 * e.high:+.1f}]" * (e.n > 1)


def figure(findings: Findings, rows: Sequence[Row], measures: Sequence[str]) -> Figure:
    """Closed-set accuracy and another along the anchor weight, the mean over seeds: a panel for each measure."""
    drawn = Figure(figsize=(3.6 * len(measures), 3.8), layout="constrained")
    for axes, measure in zip(drawn.subplots(1, len(measures), squeeze=False)[0], measures, strict=True):
        for row in rows:
            curves = list(findings.curves(row, measure).values())
            points = [[100 * sum(xy) / len(curves) for xy in zip(*at, strict=True)] for at in zip(*curves, strict=True)]
            axes.plot(*zip(*points, strict=True), "o-", markersize=3, label=row.name)
        axes.set(xlabel="closed, top-1 (%)", ylabel="top-1 (%)", title=measure)
        axes.grid(alpha=0.3)
    drawn.axes[0].legend(fontsize=7)
    return drawn
