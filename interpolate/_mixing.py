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

Progress = Callable[[int, int], object]
"""Called with the bytes done and the bytes in all."""


class Mixing:
    """The mixed tensors of open checkpoints, piece by piece; the report grows on the way."""

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
        for path, other in zip(inputs[1:], self.others, strict=True):
            take_names(other, path, self.parts, self.report)
        check_mixable(*(dict.fromkeys(checkpoint.rest) for checkpoint in checkpoints))
        others = [self.parts.paired(entries, other.entries) for other in self.others]
        as_completed = [{n: entries[n] if n in self.parts.rows else e for n, e in other.items()} for other in others]
        matched([without_extra_state(some) for some in (self.parts.shared(entries), *as_completed)], sides)
        self.mixed = {n for n, entry in entries.items() if is_mixed(n, entry.dtype) and n not in self.parts.own}
        self.operation = compiled(recipe, [name for name in entries if name in self.mixed], len(checkpoints))
        self.whole = recipe["operation"] == "slerp"  # angles are between whole tensors
        self.progress = progress or (lambda done, total: None)
        self.total = sum(entry.n_bytes for entry in entries.values())
        self.done = 0

    def pieces(self, name: str) -> Iterator[Tensor]:
        entry = self.first.entries[name]
        looking = Comparison(report_on(name, entry, name in self.mixed))
        others = self.others if looking.found.mixed else []
        for first, *rest in zip(*(self.read(source, name) for source in (self.first, *others)), strict=True):
            if name in self.parts.rows:
                rows = -1, *entry.shape[1:]
                rest = [self.parts.completed(name, o.reshape(rows), first.reshape(rows)).flatten() for o in rest]
            looking.add(first, rest)
            yield self.operation(name, [first, *rest]) if looking.found.mixed else first
            self.done += first.nbytes
            self.progress(self.done, self.total)
        self.report.tensors.append(looking.found)

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
