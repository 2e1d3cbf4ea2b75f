"""The folder of a run: which file is what, and whether a run may go on there."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import Any

from applications.openvclip.runs.texts import json_object, write_text


@dataclass(frozen=True)
class RunFolder:
    """Names of the files of a run."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.json"

    @property
    def journal(self) -> Path:
        """One JSON line an event; the first holds command, versions and hardware."""
        return self.path / "journal.jsonl"

    @property
    def curves(self) -> Path:
        """The journal as a picture."""
        return self.path / "curves.png"

    @property
    def tensorboard(self) -> Path:
        """The journal's figures as events of TensorBoard."""
        return self.path / "tensorboard"

    @property
    def trace(self) -> Path:
        """What a few steps spend their time on, if that was asked for."""
        return self.path / "trace.json.gz"

    @property
    def checkpoints(self) -> Path:
        """Everything to resume from: a folder of the last few states of training."""
        return self.path / "checkpoints"

    @property
    def last(self) -> Path:
        """The weights after the last step."""
        return self.path / "last.safetensors"

    @property
    def averaged(self) -> Path:
        """The mean of the fine-tuned weights, not patched."""
        return self.path / "averaged.safetensors"

    @property
    def patched(self) -> Path:
        """The final model: the mean, patched with the recipe's anchor weight."""
        return self.path / "patched.safetensors"

    @property
    def best(self) -> Path:
        """The mean so far, where an evaluation in training found it best, if that was before the end."""
        return self.path / "best.safetensors"

    @property
    def results(self) -> Path:
        return self.path / "results.json"

    @property
    def calibration(self) -> Path:
        """How sure its answers may be, by anchor weight."""
        return self.path / "calibration.json"

    @property
    def markdown(self) -> Path:
        """The results as tables."""
        return self.path / "results.md"

    @property
    def logits(self) -> Path:
        """The logits of evaluations, a folder for each pass."""
        return self.path / "logits"

    @property
    def plot(self) -> Path:
        return self.path / "tradeoff.png"

    def inside(self) -> list[RunFolder]:
        """The runs whose folders are in this one, which is none itself; the one that began last comes first."""
        found = [RunFolder(path.parent) for path in self.path.glob(f"*/{self.journal.name}")]
        runs = [run for run in found if run.config.exists()]
        return sorted(runs, key=lambda run: run.config.stat().st_mtime, reverse=True)

    def read_settings(self) -> dict[str, Any]:
        """The configuration of the run, as plain values.

        Raises:
            FileNotFoundError: This is no folder of a run.
        """
        if not self.config.exists():
            inside = ", ".join(str(run.path) for run in self.inside())
            told = f"it holds runs, give one of them: {inside}" if inside else f"there is no {self.config.name} in it"
            raise FileNotFoundError(f"{self.path} is no folder of a run: {told}.")
        return json_object(self.config.read_text(encoding="utf-8"), self.config)

    def open_for_training(
        self, settings: dict[str, Any], free: Collection[str] = (), *, goes_on: bool = False
    ) -> list[str]:
        """Make the folder of a new run, or see that an unfinished run may go on; its settings are left as they are.

        As long as nothing has been learnt there, any settings will do; afterwards those of the run.

        Args:
            settings: The configuration, as plain values for JSON.
            free: Settings that may differ, a name or the beginning of names: what they say does not change what is
                learnt.
            goes_on: Whether a finished run is to be trained further.

        Returns:
            The free settings that differ from those of the run so far.

        Raises:
            FileExistsError: The folder holds something else: a finished run, one of another configuration, or no run.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        if self.config.exists():
            if self.results.exists() and not goes_on:
                raise FileExistsError(
                    f"{self.path} holds a finished run; more --optimization.epochs train it further, if the schedule "
                    f"is constant; `openvclip evaluate {self.path}` evaluates it again; another --output trains anew."
                )
        elif any(path.name != ".lock" for path in self.path.iterdir()):
            raise FileExistsError(f"{self.path} is not empty and holds no run; choose another --output.")
        return self.changes(settings, free)

    def changes(self, settings: dict[str, Any], free: Collection[str] = ()) -> list[str]:
        """The free settings that differ from those of the run so far; none as long as nothing has been learnt.

        Raises:
            FileExistsError: Settings differ that are not free.
        """
        if not (self.config.exists() and self.checkpoints.exists()):
            return []
        changed = differences(self.read_settings(), settings)
        bound = [text for text in changed if not text.startswith(tuple(free))]
        if bound:
            raise FileExistsError(
                f"{self.path} holds a run of another configuration ({', '.join(bound)}), and a run keeps to its own; "
                "leave these settings as they were, or begin a new run in another --output."
            )
        return changed

    def write_settings(self, settings: dict[str, Any]) -> None:
        """Keep the configuration, as plain values; only of what has been accepted, as a run goes on with it."""
        write_text(self.config, json.dumps(settings, indent=2) + "\n")


def new_path(recipe: str) -> Path:
    """A new folder for a run that was not told where to go."""
    path = stem = Path("runs") / f"{recipe}-{datetime.now():%Y%m%d-%H%M%S}"
    for i in count(2):
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError:  # of another run that began in this second
            path = stem.with_name(f"{stem.name}-{i}")
    raise AssertionError("there are numbers enough")


def flat(settings: dict[str, Any]) -> dict[str, object]:
    """Settings by their full names, such as "sampling.frames"."""
    found: dict[str, object] = {}
    for name, value in settings.items():
        inner = flat(value) if isinstance(value, dict) else {}
        found |= {f"{name}.{part}": leaf for part, leaf in inner.items()} or {name: value}
    return found


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """The settings that differ, those in one of both too, as "sampling.frames: 4, now 8"."""

    before, after = flat(old), flat(new)
    return [
        f"{name}: {before.get(name, 'not there')}, now {after.get(name, 'not there')}"
        for name in {**before, **after}
        if name not in before or name not in after or before[name] != after[name]
    ]
