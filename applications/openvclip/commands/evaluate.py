"""Evaluate a finished run again, or weights from elsewhere: all protocols and anchor weights, each video decoded once.

python -m applications.openvclip.evaluate runs/miniature-… --anchor-weights 0.3 0.5 0.7
python -m applications.openvclip.evaluate --weights swa_2_22.pth --model.name ViT-B-16 --model.pretrained openai
    --protocols ucf101/EP1 ucf101/EP2 ucf101/EP3 --videos ucf101 UCF-101 --lists ucf101 zs_label_db
torchrun --nproc-per-node 8 -m applications.openvclip.evaluate …       # processes share the videos
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import tyro

from applications.openvclip.config import Config, DataConfig, EvaluationConfig, ModelConfig


@dataclass(frozen=True)
class Arguments:
    """What to evaluate, and on what. An evaluation that was interrupted goes on when its command is given again."""

    run: tyro.conf.Positional[Path | None] = None
    """Folder of a finished run, whose settings hold where no option says otherwise."""
    weights: Path | None = None
    """Without a run: fine-tuned weights in a file of Open-VCLIP's, open_clip's or another known form; by default none,
    for CLIP* alone."""
    model: ModelConfig = field(default_factory=lambda: ModelConfig(name="ViT-B-16", pretrained="openai"))
    """Without a run: the anchor."""
    output: Path = Path("runs/evaluation")
    """Without a run: folder of logits and results."""
    anchor_weight: float | None = None
    """Weight of the anchor in the final model; by default the run's, or 0.5."""
    anchor_weights: tuple[float, ...] = ()
    """Weights of the anchor to evaluate at; by default those of the run, or 0, 0.5 and 1."""
    protocols: tuple[str, ...] = ()
    """Published protocols such as ucf101/EP1, or JSON files of your own; by default the sets of the run."""
    videos: dict[str, str] = field(default_factory=dict)
    """Where the videos of each data set are: ucf101 FOLDER hmdb51 FOLDER, and so on; folders or URLs."""
    lists: dict[str, str] = field(default_factory=dict)
    """Where the lists of each data set are that a protocol needs."""
    unreadable: Literal["wrong", "left-out"] | None = None
    """What a video is that can't be read; by default as in the run, or a wrong answer."""
    workers: int = 2
    """Without a run: processes that decode videos."""
    time_limit_s: float = 60.0
    """Without a run: seconds that reading one video may take."""
    batch_size: int | None = None
    """Videos at a time; by default the run's, or 16."""

    def changes(self) -> dict[str, Any]:
        """The fields of `EvaluationConfig` that were given."""
        names = ("anchor_weight", "anchor_weights", "protocols", "videos", "lists", "unreadable", "batch_size")
        return {name: getattr(self, name) for name in names if getattr(self, name) not in (None, (), {})}


def main(arguments: Sequence[str] | None = None) -> None:
    parsed = tyro.cli(Arguments, prog="python -m applications.openvclip.evaluate", description=__doc__, args=arguments)
    from applications.openvclip import distributed, experiment  # torch takes seconds; --help must not wait for it
    from applications.openvclip.run_folder import RunFolder

    distributed.initialise()
    try:
        if parsed.run is not None:
            experiment.reevaluate(RunFolder(parsed.run), parsed.changes())
            return
        if not parsed.protocols:
            raise ValueError("without a run, --protocols says what to evaluate on: ucf101/EP2, or a .json file.")
        defaults: dict[str, Any] = {"anchor_weights": (0.0, 0.5, 1.0), "batch_size": 16}
        config = Config(
            recipe="evaluation",
            model=parsed.model,
            data=DataConfig(workers=parsed.workers, time_limit_s=parsed.time_limit_s),
            evaluation=EvaluationConfig(**(defaults | parsed.changes())),
        )
        experiment.evaluate_weights(config, parsed.weights, RunFolder(parsed.output))
    finally:
        distributed.finish()


if __name__ == "__main__":
    main()
