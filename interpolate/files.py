"""Checkpoint files mixed into a new one, a piece at a time, with a report and a record of how it was made."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from threading import Event

from interpolate._mixing import Mixing, Progress
from interpolate._operations import Ratio, Recipe, patch_recipe
from interpolate._recipes import RECIPE, Path, folder_of, seen_from
from interpolate.checkpoints import Checkpoint, write
from interpolate.reports import Report


def patch_files(
    anchor: Path,
    theta: Path,
    output: Path,
    *,
    anchor_weight: Ratio,
    extrapolate: bool = False,
    theta_only: Sequence[str] = (),
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
        anchor_weight: As for `patch`, and so are `extrapolate` and `theta_only`.
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
    recipe = patch_recipe(anchor_weight, extrapolate, theta_only)
    return mix_files([theta, anchor], recipe, None if dry_run else output, progress)


def average_files(
    paths: Sequence[Path],
    output: Path,
    *,
    weights: Sequence[float] | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Write the mean of several checkpoints, a uniform soup; otherwise as `patch_files`.

    Args:
        weights: One number for each checkpoint, by default equal ones; only their ratios matter.

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
    recipe = (
        {"operation": "average"} if weights is None else {"operation": "average", "weights": [*map(float, weights)]}
    )
    return mix_files(paths, recipe, None if dry_run else output, progress)


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
        mixing = Mixing(checkpoints, recipe, inputs, progress)
        report = mixing.report
        if output is not None and any(_is(os.fspath(output), checkpoint.path) for checkpoint in checkpoints):
            raise ValueError(f"{os.fspath(output)} is one of the inputs, and would be lost; write to another place.")
        if output is None:
            report.recipe = {**recipe, "inputs": inputs}
            for name in mixing.first.entries:
                for _ in mixing.pieces(name):
                    pass
            return report
        folder = folder_of(output, is_output_folder=mixing.first.is_sharded)
        pool, stopped = stack.enter_context(ThreadPoolExecutor(min(len(paths), 8))), Event()
        stack.callback(stopped.set)  # or leaving early would wait until the last byte is hashed
        hashes = [pool.submit(checkpoint.sha256, stopped) for checkpoint in checkpoints]
        report.recipe = {**recipe, "inputs": [seen_from(folder, path) for path in inputs], "sha256": []}

        def metadata(final: bool) -> dict[str, str]:
            digests = [h.result() for h in hashes] if final else ["0" * 64] * len(hashes)
            return {RECIPE: json.dumps({**(report.recipe or {}), "sha256": digests})}

        report.left_behind = mixing.first.rest if os.fspath(output).endswith(".safetensors") else []
        write(output, mixing.first, mixing.pieces, metadata)
        report.recipe["sha256"] = [h.result() for h in hashes]
    return report


def _is(output: str, place: str) -> bool:
    """Whether what is written would stand where something is read."""
    return output == place or ("://" not in output and os.path.realpath(output) == os.path.realpath(place))
