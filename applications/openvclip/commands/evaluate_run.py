"""The form of `openvclip evaluate` with a run: it has its own settings, and what it was trained from."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from applications.openvclip.config import Config, from_dict, to_dict


@dataclass(frozen=True)
class OfRun:
    """What to evaluate a run on; where no option is given, its own settings hold."""

    anchor_weight: float | None = None
    """Weight of the anchor in the final model."""
    anchor_weights: tuple[float, ...] = ()
    """Weights of the anchor to evaluate at."""
    protocols: tuple[str, ...] = ()
    """Published protocols such as ucf101/EP1, or JSON files of your own, in place of what the run was evaluated on."""
    videos: dict[str, str] = field(default_factory=dict)
    """Where the videos of each data set are: ucf101 FOLDER hmdb51 FOLDER, and so on; folders or URLs."""
    lists: dict[str, str] = field(default_factory=dict)
    """Where the lists of each data set are that a protocol needs."""
    unreadable: Literal["wrong", "left-out"] | None = None
    """What a video is that can't be read: a wrong answer, or no part of the set."""
    precision: Literal["fp32", "tf32", "bf16", "fp16"] | None = None
    """In which numbers scores are computed."""
    compile: bool | None = None
    """Whether to compile the model first."""
    batch_size: int | None = None
    """Videos at a time."""
    workers: int | None = None
    """Processes that decode videos."""
    time_limit_s: float | None = None
    """Seconds that reading one video may take."""

    def applied(self, config: Config) -> Config:
        """The run's configuration with what was given."""

        def given(*names: str) -> dict[str, object]:
            return {name: getattr(self, name) for name in names if getattr(self, name) not in (None, (), {})}

        names = ("anchor_weight", "anchor_weights", "protocols", "videos", "lists", "unreadable")
        names += ("precision", "compile", "batch_size")
        data = given("workers", "time_limit_s") | ({"test": ()} if self.protocols else {})
        return replace(
            config, evaluation=replace(config.evaluation, **given(*names)), data=replace(config.data, **data)
        )


def evaluate_run(run: Path, options: OfRun) -> None:
    """Evaluate a run's averaged weights again; its report is written anew.

    Raises:
        FileNotFoundError: There is no run, or it has no averaged weights yet.
        WeightMismatchError: The pretrained weights are not those that the run started from.
    """
    from applications.openvclip import build, distributed
    from applications.openvclip.commands.report import alone_in, report
    from applications.openvclip.inference import loading
    from applications.openvclip.ranges import check, evaluation_ranges
    from applications.openvclip.runs.folder import RunFolder

    folder = RunFolder(run)
    config = options.applied(from_dict(folder.read_settings()))
    check(evaluation_ranges(config))
    loaded = loading.of_run(folder)
    classes = json.loads(loaded.metadata["classes"])
    evaluation = replace(
        build.evaluation(loaded.source, config, build.protocols(config, classes)),
        temperatures={weight: found.temperature for weight, found in loaded.calibrations.items()},
    )
    if loading.goes_on(folder) and distributed.rank() == 0:
        print(f"{run} has not ended: evaluated is what it had at its last checkpoint, step {loaded.metadata['step']}.")
    with alone_in(folder):
        found = evaluation(loaded.anchor, loaded.theta, folder.logits, last=loaded.last)
        report(folder, found, to_dict(config))
