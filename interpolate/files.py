"""Checkpoint files mixed into a new one, a piece at a time, with a report and a record of how it was made."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from threading import Event

from torch import Tensor

from interpolate._names import prefix_before
from interpolate._operations import (
    Ratio,
    Recipe,
    as_numbers,
    compiled,
    is_mixed,
    is_recipe,
    sides_of,
    without_extra_state,
)
from interpolate._unmixable import check_mixable
from interpolate.checkpoints import Checkpoint, Entry, write
from interpolate.errors import CheckpointError, WeightMismatchError
from interpolate.patching import matched
from interpolate.reports import Comparison, Report, TensorReport, same_bits

Path = str | os.PathLike[str]
Progress = Callable[[int, int], object]
"""Called with the bytes done and the bytes in all."""

RECIPE = "interpolate"
"""The key of the recipe in a file's metadata."""


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
            `interpolate.checkpoints.write`. Its metadata holds the recipe and the hashes of the inputs; in files of
            `torch.save`, a record of the archive beside what `torch.load` gives.
        anchor_weight: As for `patch`.
        dry_run: Do everything except writing, and hashing the inputs for the record.
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
    recipe = {"operation": "patch", "anchor_weight": as_numbers(anchor_weight)}
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
    """Carry out a recipe on files, as `interpolate.patching.mix` does in memory.

    Args:
        output: What to write. None writes nothing, and nothing is hashed then: the recipe has no `sha256`.
    """
    if isinstance(paths, (str, os.PathLike)):
        raise ValueError(f"a list of checkpoints is expected, got the one path {os.fspath(paths)!r}.")
    inputs = [os.fspath(path) for path in paths]
    with ExitStack() as stack:
        checkpoints = [stack.enter_context(Checkpoint(path)) for path in inputs]
        mixing = _Mixing(checkpoints, recipe, inputs, progress)
        report = mixing.report
        if output is None:
            report.recipe = {**recipe, "inputs": inputs}
            for name in mixing.first.entries:
                for _ in mixing.pieces(name):
                    pass
            return report
        folder = _folder(output, is_output_folder=mixing.first.is_sharded)
        pool, stopped = stack.enter_context(ThreadPoolExecutor(len(paths))), Event()
        stack.callback(stopped.set)  # or leaving early would wait until the last byte is hashed
        hashes = [pool.submit(checkpoint.sha256, stopped) for checkpoint in checkpoints]
        report.recipe = {**recipe, "inputs": [_seen_from(folder, path) for path in inputs], "sha256": []}

        def metadata(final: bool) -> dict[str, str]:
            digests = [h.result() for h in hashes] if final else ["0" * 64] * len(hashes)
            return {RECIPE: json.dumps({**(report.recipe or {}), "sha256": digests})}

        report.left_behind = mixing.first.rest if os.fspath(output).endswith(".safetensors") else []
        write(output, mixing.first, mixing.pieces, metadata)
        report.recipe["sha256"] = [h.result() for h in hashes]
    return report


class _Mixing:
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
            _take_names(other, path, self.first, self.report)
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
        looking = Comparison(_report_on(name, entry, is_mixed(name, entry.dtype)))
        others = self.others if looking.found.mixed else []
        for first, *rest in zip(*(self.read(source, name) for source in (self.first, *others)), strict=True):
            looking.add(first, rest)
            yield self.operation(name, [first, *rest]) if looking.found.mixed else first
            self.done += first.nbytes
            self.progress(self.done, self.total)
        self.report.tensors.append(looking.found)

    def read(self, checkpoint: Checkpoint, name: str) -> Iterator[Tensor]:
        return iter([checkpoint.tensor(name).flatten()]) if self.whole else checkpoint.chunks(name)


def inspect(path: Path) -> Report:
    """What is in a checkpoint, read once: names, shapes, dtypes, values that are not finite, ties, recipe.

    Example:
        >>> import os, tempfile, torch
        >>> os.chdir(tempfile.mkdtemp())
        >>> torch.save({"w": torch.tensor([1.0, torch.nan])}, "a.pt")
        >>> inspect("a.pt").tensors[0].not_finite
        1
    """
    with Checkpoint(path) as checkpoint:
        report = Report([os.fspath(path)], recipe_of(checkpoint), tied=checkpoint.tied())
        for name, entry in checkpoint.entries.items():
            looking = Comparison(_report_on(name, entry, is_mixed(name, entry.dtype)))
            for piece in checkpoint.chunks(name):
                looking.add(piece, [])
            report.tensors.append(looking.found)
    return report


def diff(first: Path, second: Path) -> Report:
    """How far two checkpoints are from each other, tensor by tensor; they are equal if `Report.differs` is not.

    Names, shapes, dtypes and every bit count; neither how they are stored nor what is said of them in metadata.

    Example:
        >>> import os, tempfile, torch
        >>> os.chdir(tempfile.mkdtemp())
        >>> torch.save({"w": torch.tensor([1.0, 2.0])}, "a.pt")
        >>> torch.save({"w": torch.tensor([1.0, 5.0])}, "b.pt")
        >>> report = diff("a.pt", "b.pt")
        >>> report.differs, report.tensors[0].distance
        (True, 3.0)
    """
    paths = [os.fspath(first), os.fspath(second)]
    with Checkpoint(first) as a, Checkpoint(second) as b:
        report = Report(paths, tied=a.tied())
        _take_names(b, paths[1], a, report)
        report.unmatched = _unmatched(a, b, paths)
        for name, entry in a.entries.items():
            if name in b.entries and b.entries[name].shape == entry.shape:
                looking = Comparison(_report_on(name, entry, is_mixed(name, entry.dtype)))
                for piece, other in zip(a.chunks(name), b.chunks(name), strict=True):
                    looking.add(piece, [other])
                report.tensors.append(looking.found)
    return report


def recipe_of(checkpoint: Checkpoint) -> Recipe | None:
    """The recipe in a checkpoint's metadata, None if there is none."""
    text = checkpoint.metadata.get(RECIPE)
    if text is None:
        return None
    try:
        recipe = json.loads(text)
    except (ValueError, RecursionError):
        recipe = None
    if not is_recipe(recipe):
        raise CheckpointError(f"{checkpoint.path} holds a recipe that is none: {text!r:.200}.")
    return recipe


def verify(path: Path) -> list[str]:
    """Check a written checkpoint against its recipe: the inputs' hashes, and every tensor, mixed again and compared.

    Inputs are looked for where they were, seen from the checkpoint: a folder with all of them may be moved.

    Returns:
        What is wrong, one line each; empty if all is well.

    Raises:
        CheckpointError, OSError: The checkpoint or one of the inputs can't be read.
    """
    with ExitStack() as stack:
        made = stack.enter_context(Checkpoint(path))
        recipe = recipe_of(made)
        if recipe is None:
            return [f"{made.path} holds no recipe; it was not written by this library, or to a format without one."]
        folder = _folder(os.path.realpath(made.path))
        inputs = [os.path.join(folder, source) for source in recipe["inputs"]]
        checkpoints = [stack.enter_context(Checkpoint(source)) for source in inputs]
        problems = [
            f"{source} is not the file that was mixed: its hash is not {digest}."
            for source, checkpoint, digest in zip(inputs, checkpoints, recipe["sha256"], strict=True)
            if checkpoint.sha256() != digest
        ]
        try:
            mixing = _Mixing(checkpoints, recipe, inputs)
        except WeightMismatchError as error:
            return [*problems, str(error)]
        problems += _unmatched(mixing.first, made, [inputs[0], made.path])
        for name, entry in mixing.first.entries.items():
            if name in made.entries and made.entries[name].shape == entry.shape:
                pieces = zip(mixing.pieces(name), mixing.read(made, name), strict=True)
                if not all(same_bits(a, b) for a, b in pieces):
                    problems.append(f"{name} is not what the recipe gives.")
    return problems


def _take_names(other: Checkpoint, path: str, first: Checkpoint, report: Report) -> None:
    """Let a checkpoint have the first one's names if they differ by one prefix, and say so in the report."""
    if prefix := prefix_before(other.entries, first.entries) or prefix_before(first.entries, other.entries):
        report.prefixes[path] = prefix
        other.rename(first.entries)


def _report_on(name: str, entry: Entry, mixed: bool) -> TensorReport:
    return TensorReport(name, entry.shape, str(entry.dtype).removeprefix("torch."), mixed)


def _unmatched(first: Checkpoint, second: Checkpoint, paths: Sequence[str]) -> list[str]:
    """Names that only one of them has, and shapes that differ."""
    a, b = first.entries, second.entries
    return [
        *(f"{name} is only in {paths[0]}." for name in a if name not in b),
        *(f"{name} is only in {paths[1]}." for name in b if name not in a),
        *(
            f"{name} is {a[name].shape} in {paths[0]} and {b[name].shape} in {paths[1]}."
            for name in a
            if name in b and a[name].shape != b[name].shape
        ),
    ]


def _is_url(path: str) -> bool:
    return "://" in path


def _folder(path: Path, is_output_folder: bool = False) -> str:
    """The folder that a checkpoint is in, without links; nothing for a URL."""
    path = os.fspath(path)
    if _is_url(path):
        return ""
    return os.path.realpath(path if is_output_folder else os.path.dirname(path))


def _seen_from(folder: str, path: str) -> str:
    """A path relative to a folder, so that both can be moved together; absolute where the folder is a URL."""
    if _is_url(path):
        return path
    path = os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
    return os.path.relpath(path, folder) if folder else path
