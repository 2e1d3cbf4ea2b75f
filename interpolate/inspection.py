"""Checkpoint files looked at: what is in one, how far two are from each other, whether one is what it says it is."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack

from interpolate._mixing import Mixing, report_on, take_names
from interpolate._operations import is_mixed
from interpolate._recipes import Path, folder_of, recipe_of
from interpolate._theta_only import ThetaOnly
from interpolate.checkpoints import Checkpoint
from interpolate.errors import WeightMismatchError
from interpolate.reports import Comparison, Report, same_bits


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
            looking = Comparison(report_on(name, entry, is_mixed(name, entry.dtype)))
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
        take_names(b, paths[1], ThetaOnly((), a.entries), report)
        report.unmatched = _unmatched(a, b, paths)
        for name, entry in a.entries.items():
            if name in b.entries and b.entries[name].shape == entry.shape:
                looking = Comparison(report_on(name, entry, is_mixed(name, entry.dtype)))
                for piece, other in zip(a.chunks(name), b.chunks(name), strict=True):
                    looking.add(piece, [other])
                report.tensors.append(looking.found)
    return report


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
            return [f"{made.path} holds no recipe: it is no mixture of files, or of a form that has no room for one."]
        if recipe["operation"] == "snapshot":
            return [f"{made.path} was written in training, at step {recipe['step']}; there is nothing to make it of."]
        folder = folder_of(os.path.realpath(made.path))
        inputs = [os.path.join(folder, source) for source in recipe["inputs"]]
        checkpoints = [stack.enter_context(Checkpoint(source)) for source in inputs]
        problems = [
            f"{source} is not the file that was mixed: its hash is not {digest}."
            for source, checkpoint, digest in zip(inputs, checkpoints, recipe["sha256"], strict=True)
            if checkpoint.sha256() != digest
        ]
        try:
            mixing = Mixing(checkpoints, recipe, inputs)
        except WeightMismatchError as error:
            return [*problems, str(error)]
        problems += _unmatched(mixing.first, made, [inputs[0], made.path])
        for name, entry in mixing.first.entries.items():
            if name in made.entries and made.entries[name].shape == entry.shape:
                pieces = zip(mixing.pieces(name), mixing.read(made, name), strict=True)
                if not all(same_bits(a, b) for a, b in pieces):
                    problems.append(f"{name} is not what the recipe gives.")
    return problems


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
