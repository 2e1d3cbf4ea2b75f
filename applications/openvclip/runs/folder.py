"""The folder of a run: which file is what, and whether a run may go on there."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from applications.openvclip.checkpoint import write_text
from applications.openvclip.config import Config, differences, from_json, to_json


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
    def training_state(self) -> Path:
        """Everything to resume from, written at the end of every epoch."""
        return self.path / "training.pt"

    @property
    def averaged(self) -> Path:
        """The mean of the fine-tuned weights, not patched."""
        return self.path / "averaged.safetensors"

    @property
    def patched(self) -> Path:
        """The final model: the mean, patched with the recipe's anchor weight."""
        return self.path / "patched.safetensors"

    @property
    def results(self) -> Path:
        return self.path / "results.json"

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

    def read_config(self) -> Config:
        """The configuration of the run.

        Raises:
            FileNotFoundError: This is no folder of a run.
        """
        if not self.config.exists():
            raise FileNotFoundError(f"{self.path} is no folder of a run: there is no {self.config.name} in it.")
        return from_json(self.config.read_text(encoding="utf-8"))


def open_for_training(config: Config) -> RunFolder:
    """Make the folder of a new run, or find the one of an unfinished run of the same configuration.

    Raises:
        FileExistsError: The folder holds something else: a finished run, one of another configuration, or no run.
    """
    default = Path("runs") / f"{config.recipe}-{datetime.now():%Y%m%d-%H%M%S}"
    folder = RunFolder(config.output or default)
    if not folder.path.exists():
        folder.path.mkdir(parents=True)
    if not folder.config.exists():
        if any(folder.path.iterdir()):
            raise FileExistsError(f"{folder.path} is not empty and holds no run; choose another --output.")
        write_text(folder.config, to_json(config))
        return folder
    changed = differences(folder.read_config(), config)
    if changed:
        raise FileExistsError(
            f"{folder.path} holds a run of another configuration ({', '.join(changed)}); choose another --output."
        )
    if folder.results.exists():
        raise FileExistsError(
            f"{folder.path} holds a finished run; `python -m applications.openvclip.evaluate {folder.path}` evaluates "
            "it again, another --output trains anew."
        )
    return folder
