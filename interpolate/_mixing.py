"""The tensors of open checkpoints, mixed piece by piece as a recipe says, and looked at on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

from interpolate._names import prefix_before
from interpolate._operations import Recipe, compiled, is_mixed, sides_of, without_extra_state
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
        for path, other in zip(inputs[1:], self.others, strict=True):
            take_names(other, path, self.first, self.report)
        check_mixable(*(dict.fromkeys(checkpoint.rest) for checkpoint in checkpoints))
        matched([without_extra_state(checkpoint.entries) for checkpoint in checkpoints], sides)
        entries = self.first.entries
        self.mixed = [name for name, entry in entries.items() if is_mixed(name, entry.dtype)]
        self.operation = compiled(recipe, self.mixed, len(checkpoints))
        self.whole = recipe["operation"] == "slerp"  # angles are between whole tensors
        self.progress = progress or (lambda done, total: None)
        self.total = sum(entry.n_bytes for entry in entries.values())
        self.done = 0

    def pieces(self, name: str) -> Iterator[Tensor]:
        entry = self.first.entries[name]
        looking = Comparison(report_on(name, entry, is_mixed(name, entry.dtype)))
        others = self.others if looking.found.mixed else []
        for first, *rest in zip(*(self.read(source, name) for source in (self.first, *others)), strict=True):
            looking.add(first, rest)
            yield self.operation(name, [first, *rest]) if looking.found.mixed else first
            self.done += first.nbytes
            self.progress(self.done, self.total)
        self.report.tensors.append(looking.found)

    def read(self, checkpoint: Checkpoint, name: str) -> Iterator[Tensor]:
        return iter([checkpoint.tensor(name).flatten()]) if self.whole else checkpoint.chunks(name)


def take_names(other: Checkpoint, path: str, first: Checkpoint, report: Report) -> None:
    """Let a checkpoint have the first one's names if they differ by one prefix, and say so in the report."""
    if prefix := prefix_before(other.entries, first.entries) or prefix_before(first.entries, other.entries):
        report.prefixes[path] = prefix
        other.rename(first.entries)


def report_on(name: str, entry: Entry, mixed: bool) -> TensorReport:
    return TensorReport(name, entry.shape, str(entry.dtype).removeprefix("torch."), mixed)
