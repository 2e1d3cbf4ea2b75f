"""Checkpoint files mixed into a new one, a piece at a time, with a report and a record of how it was made."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from interpolate._names import prefix_before
from interpolate._unmixable import check_mixable
from interpolate.checkpoints import Checkpoint, write
from interpolate.patching import Ratio, Recipe, compiled, is_mixed
from interpolate.weights import check_match

Path = str | os.PathLike[str]
Progress = Callable[[int, int], object]
"""Called with the bytes done and the bytes in all."""

RECIPE = "interpolate"
"""The key of the recipe in a file's metadata."""


@dataclass
class TensorReport:
    """What was found in one tensor of the inputs."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    mixed: bool
    distance: float = 0.0
    """The largest Euclidean distance of another input's tensor from the first one's; nan where there is none."""
    not_finite: int = 0
    """How many values are nan or infinite, in all inputs together."""
    differs: bool = False
    """Whether another input's tensor has other values than the first one's, as far as it was read."""


@dataclass
class Report:
    """What was mixed, how, and what was found; made before anything appears under the output's name."""

    recipe: Recipe
    tensors: list[TensorReport] = field(default_factory=list)
    tied: list[tuple[str, ...]] = field(default_factory=list)
    """Names that share memory in the first input."""
    prefixes: dict[str, str] = field(default_factory=dict)
    """What stands before all names of either an input or the first one, and was ignored; by the input's path."""

    def as_json(self) -> str:
        return json.dumps(asdict(self), indent=2)

    def __str__(self) -> str:
        mixed = [t for t in self.tensors if t.mixed]
        not_finite = [t for t in self.tensors if t.not_finite]
        furthest = sorted(mixed, key=lambda t: -t.distance)[:3]
        lines = [
            f"{self.recipe['operation']} {', '.join(self.recipe['inputs'])}",
            f"{len(self.tensors)} tensors, {len(mixed)} of them weights; distance of the inputs "
            f"{sum(t.distance**2 for t in mixed) ** 0.5:.4g}, most in "
            + ", ".join(f"{t.name} ({t.distance:.4g})" for t in furthest),
            *(f"{t.name}: {t.not_finite} values are nan or infinite in the inputs" for t in not_finite),
            *(f"tied: {', '.join(names)}" for names in self.tied),
            *(f"{path} matches apart from {prefix!r} before all names" for path, prefix in self.prefixes.items()),
        ]
        return "\n".join(lines)


def patch_files(
    anchor: Path,
    theta: Path,
    output: Path,
    *,
    anchor_weight: Ratio,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Write `anchor_weight * anchor + (1 - anchor_weight) * theta`, bit for bit what `patch` gives, in little memory.

    Args:
        anchor: Path or URL of the pretrained weights; see `interpolate.checkpoints` for what is read.
        theta: Path or URL of the fine-tuned weights.
        output: Written in the names, dtypes and shards of theta, and not before all of it is well: see
            `interpolate.checkpoints.write`. Its metadata holds the recipe and the hashes of the inputs, except in a
            bare state dict of `torch.save`, which has no room for them.
        anchor_weight: As for `patch`.
        dry_run: Do everything except writing.
        progress: Called from time to time.

    Raises:
        WeightMismatchError, ValueError: As for `patch`; nothing is written then.
        CheckpointError, OSError: A file can't be read or written.

    Example:
        >>> import os, tempfile, torch
        >>> from safetensors.torch import load_file, save_file
        >>> os.chdir(tempfile.mkdtemp())
        >>> save_file({"w": torch.ones(1)}, "anchor.safetensors")
        >>> save_file({"w": torch.zeros(1)}, "theta.safetensors")
        >>> report = patch_files("anchor.safetensors", "theta.safetensors", "out.safetensors", anchor_weight=0.25)
        >>> load_file("out.safetensors"), report.tensors[0].distance
        ({'w': tensor([0.2500])}, 1.0)
    """
    recipe = {"operation": "patch", "anchor_weight": anchor_weight}
    return mix_files([theta, anchor], recipe, None if dry_run else output, progress)


def average_files(
    paths: Sequence[Path], output: Path, *, dry_run: bool = False, progress: Progress | None = None
) -> Report:
    """Write the mean of several checkpoints, a uniform soup; otherwise as `patch_files`.

    Example:
        >>> import os, tempfile, torch
        >>> from safetensors.torch import load_file, save_file
        >>> os.chdir(tempfile.mkdtemp())
        >>> save_file({"w": torch.ones(1)}, "a.safetensors")
        >>> save_file({"w": torch.zeros(1)}, "b.safetensors")
        >>> report = average_files(["a.safetensors", "b.safetensors"], "out.safetensors")
        >>> load_file("out.safetensors")
        {'w': tensor([0.5000])}
    """
    return mix_files(paths, {"operation": "average"}, None if dry_run else output, progress)


def mix_files(paths: Sequence[Path], recipe: Recipe, output: Path | None, progress: Progress | None = None) -> Report:
    """Carry out a recipe on files, as `interpolate.patching.mix` does in memory; None as output writes nothing."""
    recipe = {**recipe, "inputs": [os.fspath(path) for path in paths]}
    with ExitStack() as stack:
        checkpoints = [stack.enter_context(Checkpoint(path)) for path in paths]
        pool = stack.enter_context(ThreadPoolExecutor(len(paths)))
        hashes = [pool.submit(checkpoint.sha256) for checkpoint in checkpoints]
        first = checkpoints[0]
        report = Report(recipe, tied=first.tied())
        mixing = _Mixing(checkpoints, recipe, report, progress or (lambda done, total: None))

        def metadata(final: bool) -> dict[str, str]:
            digests = [h.result() for h in hashes] if final else ["0" * 64] * len(hashes)
            return {RECIPE: json.dumps({**recipe, "sha256": digests})}

        if output is None:
            for name in first.entries:
                for _ in mixing.pieces(name):
                    pass
        else:
            write(output, first, mixing.pieces, metadata)
        recipe["sha256"] = [h.result() for h in hashes]
    return report


class _Mixing:
    """The mixed tensors of open checkpoints, piece by piece; the report grows on the way."""

    def __init__(self, checkpoints: list[Checkpoint], recipe: Recipe, report: Report, progress: Progress) -> None:
        self.checkpoints = checkpoints
        self.report = report
        self.progress = progress
        self.whole = recipe["operation"] == "slerp"  # angles are between whole tensors
        self.only_read = recipe["operation"] == "read"
        entries = checkpoints[0].entries
        for other in checkpoints[1:]:
            if prefix := prefix_before(other.entries, entries) or prefix_before(entries, other.entries):
                report.prefixes[other.path] = prefix
            other.rename(entries)
            check_match(entries, other.entries)
        if not self.only_read:
            check_mixable(*(checkpoint.entries for checkpoint in checkpoints))
        self.operation = compiled(recipe, list(entries), len(checkpoints))
        self.total = sum(entry.n_bytes for entry in entries.values())
        self.done = 0

    def pieces(self, name: str) -> Iterator[Tensor]:
        first, entry = self.checkpoints[0], self.checkpoints[0].entries[name]
        found = TensorReport(name, entry.shape, str(entry.dtype).removeprefix("torch."), is_mixed(name, entry.dtype))
        sources = self.checkpoints if found.mixed or self.only_read else [first]
        squares = 0.0
        for first_piece, *others in zip(*(self._read(source, name) for source in sources), strict=True):
            distance = max((_distance(first_piece, other) for other in others), default=float("nan"))
            found.differs |= distance > 0
            if not distance < float("inf"):  # something is not finite, or there is nothing to compare with
                found.not_finite += sum(map(_count_not_finite, (first_piece, *others)))
                found.differs |= not all(torch.equal(first_piece, other) for other in others)
            squares += distance**2
            yield self.operation(name, [first_piece, *others]) if found.mixed else first_piece
            self.done += first_piece.nbytes
            self.progress(self.done, self.total)
        found.distance = squares**0.5
        self.report.tensors.append(found)

    def _read(self, checkpoint: Checkpoint, name: str) -> Iterator[Tensor]:
        return iter([checkpoint.tensor(name).flatten()]) if self.whole else checkpoint.chunks(name)


def _distance(first: Tensor, other: Tensor) -> float:
    """Not finite if one of the tensors is not."""
    precision = torch.float32 if first.is_floating_point() else torch.float64
    return torch.linalg.vector_norm(first.to(precision) - other.to(precision)).item()


def _count_not_finite(tensor: Tensor) -> int:
    return int((~tensor.double().isfinite()).sum()) if tensor.is_floating_point() else 0


def inspect(path: Path) -> Report:
    """What is in a checkpoint, read once: names, shapes, dtypes, values that are not finite, ties, recipe."""
    report = mix_files([path], {"operation": "read"}, None)
    report.recipe = recipe_of(path) or report.recipe
    return report


def diff(first: Path, second: Path) -> Report:
    """How far two checkpoints are from each other, tensor by tensor."""
    return mix_files([first, second], {"operation": "read"}, None)


def recipe_of(path: Path) -> Recipe | None:
    """The recipe in a checkpoint's metadata, None if there is none."""
    with Checkpoint(path) as checkpoint:
        text = checkpoint.metadata.get(RECIPE)
    return None if text is None else json.loads(text)


def verify(path: Path) -> list[str]:
    """Check a written checkpoint against its recipe: the inputs' hashes, and every tensor, mixed again and compared.

    Returns:
        What is wrong, one line each; empty if all is well.
    """
    recipe = recipe_of(path)
    if recipe is None:
        return [f"{os.fspath(path)} holds no recipe; it was not written by this library, or to a format without one."]
    problems = []
    with ExitStack() as stack:
        made = stack.enter_context(Checkpoint(path))
        checkpoints = [stack.enter_context(Checkpoint(source)) for source in recipe["inputs"]]
        for checkpoint, digest in zip(checkpoints, recipe["sha256"], strict=True):
            if checkpoint.sha256() != digest:
                problems.append(f"{checkpoint.path} is not the file that was mixed: its hash is not {digest}.")
        mixing = _Mixing(checkpoints, recipe, Report(recipe), lambda done, total: None)
        check_match(checkpoints[0].entries, made.entries)
        for name in made.entries:
            pieces = zip(mixing.pieces(name), mixing._read(made, name), strict=True)
            same = [torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in pieces]  # all of them, to the end
            if not all(same):
                problems.append(f"{name} is not what the recipe gives.")
    return problems
