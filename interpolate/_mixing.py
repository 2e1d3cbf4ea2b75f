"""The tensors of open checkpoints, mixed piece by piece as a recipe says, and looked at on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

from interpolate._operations import Recipe, compiled, is_mixed, sides_of, without_extra_state
from interpolate._theta_only import ThetaOnly
from interpolate._unmixable import check_mixable
from interpolate.checkpoints import Checkpoint, Entry
from interpolate.patching import matched
from interpolate.reports import Comparison, Report, TensorReport
from interpolate.weights import mixing_precision

Progress = Callable[[int, int], object]
"""Called with the bytes done and the bytes in all."""


class Mixing:
    """The mixed tensors of open checkpoints, piece by piece; the report grows on the way.

    An average with an `anchor_weight` is one of all checkpoints but the last, then mixed with that one as `patch` does.
    """

    def __init__(
        self, checkpoints: list[Checkpoint], recipe: Recipe, inputs: list[str], progress: Progress | None = None
    ) -> None:
        if not checkpoints:
            raise ValueError("there is nothing to mix: no checkpoint was given.")
        self.first, *self.others = checkpoints
        sides = sides_of(recipe, len(inputs), inputs)
        self.report = Report(sides, tied=self.first.tied())
        entries = self.first.entries
        self.parts = ThetaOnly(recipe.get("theta_only", ()), entries)
        is_patched_mean = recipe["operation"] == "average" and "anchor_weight" in recipe
        self.n_averaged = len(checkpoints) - 1 if is_patched_mean else 0
        parts = [self.parts if i >= self.n_averaged else ThetaOnly((), entries) for i in range(1, len(checkpoints))]
        for own, path, other in zip(parts, inputs[1:], self.others, strict=True):
            take_names(other, path, own, self.report)
        check_mixable(*(dict.fromkeys(checkpoint.rest) for checkpoint in checkpoints))
        averaged = [entries, *(other.entries for other in self.others[: max(0, self.n_averaged - 1)])]
        matched([without_extra_state(some) for some in averaged], sides[: len(averaged)])
        others = [
            {n: entries[n] if n in own.rows else e for n, e in own.paired(entries, other.entries).items()}
            for own, other in zip(parts, self.others, strict=True)
        ]
        matched([without_extra_state(self.parts.shared(some)) for some in (entries, *others)], sides)
        weights = [name for name, entry in entries.items() if is_mixed(name, entry.dtype)]
        self.mixed = {name for name in weights if self.n_averaged > 1 or name not in self.parts.own}
        with_anchor = [name for name in weights if name not in self.parts.own]
        if is_patched_mean:
            how = {name: value for name, value in recipe.items() if name != "anchor_weight"}
            self.mean = compiled(how, weights, self.n_averaged)
            self.operation = compiled({**recipe, "operation": "patch"}, with_anchor, 2)
        else:
            self.operation = compiled(recipe, with_anchor, len(checkpoints))
        self.whole = recipe["operation"] == "slerp"  # angles are between whole tensors
        self.progress = progress or (lambda done, total: None)
        self.total = sum(entry.n_bytes for entry in entries.values())
        self.done = 0

    def pieces(self, name: str) -> Iterator[Tensor]:
        entry = self.first.entries[name]
        looking = Comparison(report_on(name, entry, name in self.mixed))
        others = self.others if looking.found.mixed else []
        if name in self.parts.own:
            others = others[: self.n_averaged - 1]
        for first, *rest in zip(*(self.read(source, name) for source in (self.first, *others)), strict=True):
            looking.add(first, [self._completed(name, other, first) for other in rest])
            yield self._mix(name, first, rest) if looking.found.mixed else first
            self.done += first.nbytes
            self.progress(self.done, self.total)
        self.report.tensors.append(looking.found)

    def _mix(self, name: str, first: Tensor, rest: list[Tensor]) -> Tensor:
        theta = first
        if self.n_averaged:  # rounded when it has been patched
            wide = first.to(mixing_precision(first.dtype))
            theta, rest = self.mean(name, [wide, *rest[: self.n_averaged - 1]]), rest[self.n_averaged - 1 :]
        if rest or not self.n_averaged:
            theta = self.operation(name, [theta, *(self._completed(name, other, theta) for other in rest)])
        return theta.to(first.dtype)

    def _completed(self, name: str, other: Tensor, theta: Tensor) -> Tensor:
        """With theta's rows, where only theta has them."""
        if name not in self.parts.rows:
            return other
        rows = -1, *self.first.entries[name].shape[1:]
        return self.parts.completed(name, other.reshape(rows), theta.reshape(rows)).flatten()

    def read(self, checkpoint: Checkpoint, name: str) -> Iterator[Tensor]:
        whole = self.whole or name in self.parts.rows  # pieces of fewer rows would be others
        return iter([checkpoint.tensor(name).flatten()]) if whole else checkpoint.chunks(name)


def take_names(other: Checkpoint, path: str, parts: ThetaOnly, report: Report) -> None:
    """Let a checkpoint have theta's names if they differ by one prefix, and say so in the report."""
    names = parts.names(other.entries)
    shorter, longer = sorted(next(iter(names.items()), ("", "")), key=len)
    if prefix := longer.removesuffix(shorter):
        report.prefixes[path] = prefix
    other.rename(names)


def report_on(name: str, entry: Entry, mixed: bool) -> TensorReport:
    return TensorReport(name, entry.shape, str(entry.dtype).removeprefix("torch."), mixed)
