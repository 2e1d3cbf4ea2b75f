"""Sets of weights judged on held-out data, and one of them chosen: by the mean of its metrics, with intervals."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from interpolate._operations import Recipe
from interpolate._recipes import Path
from interpolate.files import mix_files
from interpolate.reports import Report, as_json
from interpolate.weights import Weights, listed

Score = Any
"""A number; or, so that there are intervals, one for each example (a list, an array, a tensor); higher is better."""

Evaluate = Callable[[dict[str, Tensor]], "Score | Mapping[str, Score]"]

_RESAMPLED = 1000
_COVERED = 0.95


@dataclass(frozen=True)
class Candidate:
    """A set of weights: how it is made, and what it is worth by each metric."""

    settings: dict[str, Any]
    recipe: Recipe
    values: dict[str, float]
    intervals: dict[str, tuple[float, float] | None]
    """Of 95 %, by bootstrap over the examples; None where a metric is a single number."""

    @property
    def value(self) -> float:
        """The mean of the metrics, as in PAINT (Ilharco et al. 2022)."""
        return math.fsum(self.values.values()) / len(self.values)


@dataclass(frozen=True)
class Choice:
    """What was judged on which data, and what was chosen."""

    data: str
    inputs: list[str]
    """What candidates are made of."""
    candidates: list[Candidate]
    best: int
    as_good: list[int]
    """Those others that the examples can't tell from the best: by paired bootstrap, at 95 %. None without examples."""
    notes: list[str]
    """What was left out, and why."""

    @property
    def chosen(self) -> Candidate:
        return self.candidates[self.best]

    @property
    def front(self) -> list[int]:
        """The Pareto front: those than which no other is better by one metric and as good by all."""
        values = [tuple(c.values.values()) for c in self.candidates]
        return [
            i
            for i, own in enumerate(values)
            if not any(other != own and all(b >= a for a, b in zip(own, other, strict=True)) for other in values)
            and not any(map(math.isnan, own))
        ]

    def check_report_on(self, data: str) -> None:
        """Raise `ValueError` where a score is to be reported on the data of the choice: it would be too good."""
        if data == self.data:
            raise ValueError(
                f"{self.chosen.settings} was chosen on {self.data!r}; a score on the same data would be too good. "
                "Report on data that was held out from the choice."
            )

    def write(
        self, output: Path, *, dry_run: bool = False, progress: Callable[[int, int], object] | None = None
    ) -> Report:
        """Write the chosen weights, with the recipe that `verify` checks and the data of the choice.

        They are what was evaluated; averages without an anchor are rounded once, so that a last bit of half precision
        can differ.
        """
        recipe = {**self.chosen.recipe, "chosen_on": self.data, "values": self.chosen.values}
        return mix_files(self.inputs, recipe, None if dry_run else output, progress)

    def as_json(self) -> str:
        return as_json({**asdict(self), "chosen": asdict(self.chosen), "front": self.front})

    def __str__(self) -> str:
        metrics = [*self.chosen.values]
        marks = dict.fromkeys(self.front if len(metrics) > 1 else [], "front") | dict.fromkeys(self.as_good, "as good")
        marks[self.best] = "chosen"
        rows = [
            [*(_plain(v) for v in c.settings.values()), *(_told(c, m) for m in metrics), marks.get(i, "")]
            for i, c in enumerate(self.candidates)
        ]
        rows.insert(0, [*self.chosen.settings, *metrics, ""])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([*lines, *self.notes, f"chosen on {self.data}: report on other data"])

    def plot(self, file: Path) -> None:
        """Draw the candidates into an image: one metric over the weight of the anchor, or two against each other.

        Raises:
            ValueError: matplotlib is not installed.
        """
        check_can_plot()
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 4), layout="constrained")
        axes: Any = figure.subplots()
        groups: dict[str, list[int]] = {}
        for i, candidate in enumerate(self.candidates):
            groups.setdefault(str(next(iter(candidate.settings.values()))), []).append(i)
        metrics = [*self.chosen.values]
        for label, members in groups.items():
            y = [self.candidates[i].values[metrics[-1]] for i in members]
            if len(metrics) > 1:
                axes.scatter([self.candidates[i].values[metrics[0]] for i in members], y, label=label)
            else:
                x = [self.candidates[i].settings["anchor_weight"] for i in members]
                axes.errorbar(x, y, yerr=self._errors(members, metrics[0]), marker="o", capsize=2, label=label)
        if len(metrics) > 1:
            front = sorted(tuple(self.candidates[i].values.values())[:2] for i in self.front)
            axes.plot(*zip(*front, strict=True), color="grey", linewidth=1, zorder=0, label="Pareto front")
            axes.set(xlabel=metrics[0], ylabel=metrics[1])
            place = tuple(self.chosen.values.values())[:2]
        else:
            axes.set(xlabel="weight of the anchor", ylabel=metrics[0])
            place = self.chosen.settings["anchor_weight"], self.chosen.value
        axes.scatter(*place, marker="*", s=200, color="black", zorder=5, label=f"chosen on {self.data}")
        axes.legend()
        figure.savefig(os.fspath(file))

    def _errors(self, members: list[int], metric: str) -> list[list[float]] | None:
        found = [(c.values[metric], c.intervals[metric]) for c in (self.candidates[i] for i in members)]
        pairs = [(value - ends[0], ends[1] - value) for value, ends in found if ends]
        return [[max(0.0, e) for e in side] for side in zip(*pairs, strict=True)] if len(pairs) == len(found) else None


class Judging:
    """Candidates judged one after the other.

    Args:
        evaluate: The metrics of a set of weights by name, or one alone.
        data: Name of the held-out data that `evaluate` uses.
        metrics: The names that `evaluate` must give; any if there are none.

    Raises:
        ValueError: The data are those of a test.
    """

    def __init__(self, evaluate: Evaluate, data: str, metrics: Sequence[str] = ()) -> None:
        check_held_out("data", data)
        self.evaluate, self.data, self.metrics = evaluate, data, [*metrics]
        self.judged: list[tuple[dict[str, Any], Recipe, dict[str, Tensor]]] = []

    def judge(self, settings: dict[str, Any], recipe: Recipe, weights: Weights) -> float:
        """The mean of the metrics of these weights."""
        found: Any = self.evaluate(dict(weights))
        scores = {
            name: _scores(score)
            for name, score in (found.items() if isinstance(found, Mapping) else [("value", found)])
        }
        self.metrics = self.metrics or [*scores]
        if scores.keys() != {*self.metrics} or not scores:
            raise ValueError(
                f"evaluate must give the metrics {', '.join(self.metrics)}, got {', '.join(scores) or 'none'}."
            )
        scores = {name: scores[name] for name in self.metrics}
        for name, score in self.judged[0][2].items() if self.judged else ():
            if score.shape != scores[name].shape:
                raise ValueError(
                    f"evaluate must score the same examples always; {name} had {len(score)}, then {len(scores[name])}."
                )
        self.judged.append((settings, recipe, scores))
        return math.fsum(s.mean().item() for s in scores.values()) / len(scores)

    def choice(self, inputs: Sequence[str], notes: Sequence[str] = ()) -> Choice:
        """The best of those judged, which is never one with nan."""
        resampled = {name: _resampled(torch.stack([s[name] for *_, s in self.judged])) for name in self.metrics}
        candidates = [
            Candidate(
                settings,
                recipe,
                {n: s.mean().item() for n, s in scores.items()},
                {n: _interval(r, i) for n, r in resampled.items()},
            )
            for i, (settings, recipe, scores) in enumerate(self.judged)
        ]
        comparable = [i for i, candidate in enumerate(candidates) if not math.isnan(candidate.value)]
        if not comparable:
            raise ValueError(f"evaluate gave nan for all of {len(candidates)} candidates.")
        best = max(comparable, key=lambda i: candidates[i].value)
        as_good: list[int] = []
        if all(r is not None for r in resampled.values()):
            means = torch.stack([r for r in resampled.values() if r is not None]).mean(0)
            lowest = (means[:, best : best + 1] - means).quantile((1 - _COVERED) / 2, 0)
            as_good = [i for i in comparable if i != best and lowest[i] <= 0]
        return Choice(self.data, [*inputs], candidates, best, as_good, [*notes])


def check_held_out(option: str, name: str) -> None:
    """Raise `ValueError` unless a name may be that of data to choose on: what is chosen on a test set wins on it."""
    if not name:
        raise ValueError(f"{option} must name the held-out data that evaluate uses, got ''.")
    if re.search(r"(?<![a-z])test(?![a-z])", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()):
        raise ValueError(
            f"{option} {name!r} is that of a test set: what is chosen on it would look too good there. Choose on data "
            "that is held out for choosing, and report on the test set."
        )


def check_can_plot() -> None:
    """Raise `ValueError` without matplotlib."""
    try:
        import matplotlib.figure  # noqa: F401 # optional
    except ImportError as error:
        raise ValueError("plots need matplotlib: pip install matplotlib, or leave the plot away.") from error


def _scores(score: Score) -> Tensor:
    try:
        scores = torch.as_tensor(score, dtype=torch.float64).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"a metric must be a number, or one for each example, got {score!r:.80}.") from error
    if scores.ndim > 1 or not scores.numel():
        raise ValueError(f"a metric must be a number, or one for each example, got the shape {tuple(scores.shape)}.")
    return scores.reshape(-1)


def _resampled(scores: Tensor) -> Tensor | None:
    """Means over examples drawn with replacement, the same for all candidates: one row a drawing."""
    n = scores.shape[1]
    if n == 1:
        return None
    generator = torch.Generator().manual_seed(0)
    drawn = (torch.randint(n, (n,), generator=generator) for _ in range(_RESAMPLED))
    return torch.stack([scores[:, examples].mean(1) for examples in drawn])


def _interval(resampled: Tensor | None, i: int) -> tuple[float, float] | None:
    if resampled is None:
        return None
    tail = (1 - _COVERED) / 2
    low, high = resampled[:, i].quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high


def _plain(setting: Any) -> str:
    if isinstance(setting, Mapping):
        pairs = [f"{name}={value:.3g}" for name, value in setting.items()]
        return " ".join(pairs) if len(pairs) <= 6 else listed(pairs)
    return f"{setting:.4g}" if isinstance(setting, float) else str(setting)


def _told(candidate: Candidate, metric: str) -> str:
    ends = candidate.intervals[metric]
    return f"{candidate.values[metric]:.6g}" + (f" [{ends[0]:.4g}, {ends[1]:.4g}]" if ends else "")
