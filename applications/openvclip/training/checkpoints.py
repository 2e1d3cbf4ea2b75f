"""Checkpoints of a run in training: numbered, whole or not at all, checked when they are read, and safe to read.

A checkpoint is a folder, `step-00000123`, of what `interpolate.state` writes (safetensors of each process, which any
number of processes can read, and JSON), and of `checksums.json`, which is written last.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from interpolate.atomic import replaced_path, replacing
from interpolate.state import load_state, on_first, save_state

if TYPE_CHECKING:
    from torch.distributed.checkpoint.staging import DefaultStager

_CHECKSUMS = "checksums.json"


class Checkpoints:
    """The checkpoints of a run: the last few are kept, and the newest that is whole is the one to go on from.

    Writing goes on beside training: `save` returns as soon as the state has been copied. All processes call `save`,
    `wait`, `load` and `keep_best` together. A state is nested dicts of tensors, DTensors, numbers, texts, None and
    lists of them, with names that hold no "/".

    Args:
        folder: Where the checkpoints are; made with the first.
        keep: How many of the last are kept, at least 1.

    Raises:
        ValueError: `keep` is below 1.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        if keep < 1:
            raise ValueError(f"keep must be at least 1, got {keep}: a run needs a checkpoint to go on from.")
        self.folder = folder
        self.keep = keep
        self._thread = ThreadPoolExecutor(1, "checkpoints")
        self._pending: Future[None] | None = None
        # the thread's own: collectives of two threads on one group would meet each other's
        self._group: Any = dist.new_group(backend="gloo") if dist.is_initialized() else None

    @cached_property
    def _stager(self) -> DefaultStager:
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions  # takes a second; many only load

        return DefaultStager(StagingOptions(False, False, False, False))

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Write a checkpoint; only the copying of the state is waited for, and the writing of the one before.

        Raises:
            OSError: The checkpoint before this one could not be written; so also from `wait`.
        """
        self.wait()
        staged: Any = self._stager.stage(state)
        self._pending = self._thread.submit(self._write, step, staged)

    def wait(self) -> None:
        """Until what `save` began is on the disk; raises what went wrong with it."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def load(self, state: dict[str, Any], *, part: bool = False, step: int | None = None) -> int | None:
        """Read a checkpoint that is whole: tensors into those of `state`, everything else into its dicts.

        Args:
            state: What to read, in the form of what was saved.
            part: Whether `state` may be a part of what was saved.
            step: Of which checkpoint; by default of the newest that is whole.

        Returns:
            Its step; None if there is no checkpoint, and then nothing has been changed.

        Raises:
            CheckpointError: The checkpoint is of another state than this; the message says where they differ.
            ValueError: There are checkpoints, and none of them is whole; or that of `step` is not.
        """
        self.wait()
        step = on_first(self.newest if step is None else partial(self._whole, step), self._group)
        if step is not None:
            load_state(str(self._path(step)), state, self._group, part=part)
        return step

    def steps(self) -> list[int]:
        """The steps of which there are checkpoints, whole or not, in order."""
        names = [path.name for path in self.folder.iterdir()] if self.folder.is_dir() else []
        return sorted(int(found[1]) for name in names if (found := re.fullmatch(r"step-(\d+)", name)))

    def newest(self) -> int | None:
        """The last step whose checkpoint is whole; None if there is no checkpoint.

        Raises:
            ValueError: There are checkpoints, and none of them is whole.
        """
        problems = []
        for step in reversed(self.steps()):
            problem = damage(self._path(step))
            if problem is None:
                for text in problems:
                    warnings.warn(f"{text}; going on from step {step}.", stacklevel=2)
                return step
            problems.append(problem)
        if problems:
            raise ValueError(f"no checkpoint in {self.folder} is whole: {'; '.join(problems)}. Begin a new run.")
        return None

    def _whole(self, step: int) -> int:
        if problem := damage(self._path(step)):
            raise ValueError(f"{problem}.")
        return step

    def keep_best(self, step: int, value: float) -> None:
        """Keep the checkpoint of this step, beside the last ones, until another's value is higher.

        Raises:
            ValueError: The value is not finite, or there is no checkpoint of this step.
        """
        self.wait()
        if not math.isfinite(value):
            raise ValueError(f"the best checkpoint is that of the highest value, got {value} at step {step}.")

        def note() -> None:
            if step not in self.steps():
                raise ValueError(f"there is no checkpoint of step {step} in {self.folder}, there are {self.steps()}.")
            best = self.best()
            if best is None or value > best[1]:
                with replacing(self._best_path) as file:
                    file.write(json.dumps({"step": step, "value": value}).encode())

        on_first(note, self._group)

    def best(self) -> tuple[int, float] | None:
        """The step that is kept for its value, and the value."""
        if not self._best_path.exists():
            return None
        best = json.loads(self._best_path.read_text(encoding="utf-8"))
        return (best["step"], best["value"]) if best["step"] in self.steps() else None

    def _write(self, step: int, state: dict[str, Any]) -> None:
        """In the thread, in every process: the parts of the state, then the checksums, then the name."""
        try:
            with ExitStack() as stack:
                new = on_first(lambda: stack.enter_context(self._begun(step)), self._group)
                save_state(new, state, self._group)
                on_first(lambda: self._finish(step, new, stack), self._group)
        except OSError as error:
            text = f"the checkpoint of step {step} was not written: {error}. Those before it are as they were."
            raise OSError(error.errno, text) from error

    def _begun(self, step: int) -> AbstractContextManager[str]:
        """A folder under another name, which gets that of the step when its block ends well."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return replaced_path(str(self._path(step)), folder=True)

    def _finish(self, step: int, new: str, naming: ExitStack) -> None:
        checksums = {path.name: _sha256(path) for path in sorted(Path(new).iterdir())}
        with replacing(f"{new}/{_CHECKSUMS}") as file:
            file.write(json.dumps(checksums, indent=1).encode())
        path = self._path(step)
        if path.exists():  # damaged, or of an attempt that went on from an earlier one
            os.rename(path, f"{new}-former")
        naming.close()
        best = self.best()
        kept = [s for s in self.steps() if s <= step][-self.keep :] + ([best[0]] if best else [])
        for other in self.steps():  # those of later steps are damaged: otherwise this run had gone on from them
            if other > step or other not in kept:
                shutil.rmtree(self._path(other))

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    @property
    def _best_path(self) -> Path:
        return self.folder / "best.json"


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint's folder; None if it is whole."""
    try:
        checksums = json.loads((path / _CHECKSUMS).read_text(encoding="utf-8"))
        wrong = [name for name, checksum in checksums.items() if _sha256(path / name) != checksum]
    except (OSError, ValueError, AttributeError) as error:
        return f"{path} is damaged ({type(error).__name__}: {error})"
    return f"{path} is damaged ({', '.join(wrong)}: not what was written)" if wrong else None


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
