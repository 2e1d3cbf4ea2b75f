"""The form of `openvclip evaluate` without a run: weights that no run of this program made."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import tyro

from applications.openvclip.config import Config, DataConfig, EvaluationConfig, ModelConfig, to_dict


@dataclass(frozen=True)
class OfWeights:
    """What to evaluate, and on what. An evaluation that was interrupted goes on when its command is given again."""

    weights: str | None = None
    """Fine-tuned weights in a file of Open-VCLIP's, open_clip's or another known form, a path or URL; PATH::KEY where
    it has several sets of weights. By default none, for CLIP* alone."""
    model: ModelConfig = field(default_factory=lambda: ModelConfig(name="ViT-B-16", pretrained="openai"))
    """The anchor."""
    output: Path = Path("runs/evaluation")
    """Folder of logits and results."""
    evaluation: Annotated[EvaluationConfig, tyro.conf.arg(name="")] = field(
        default_factory=lambda: EvaluationConfig(anchor_weights=(0.0, 0.5, 1.0), batch_size=16)
    )
    workers: int = 2
    """Processes that decode videos."""
    time_limit_s: float = 60.0
    """Seconds that reading one video may take."""


def evaluate_weights(options: OfWeights) -> None:
    """Evaluate weights that no run of this program made; without any, CLIP* alone."""
    from rich.console import Console

    from applications.openvclip import build
    from applications.openvclip.commands.report import alone_in, report
    from applications.openvclip.inference import loading
    from applications.openvclip.ranges import check, evaluation_ranges
    from applications.openvclip.runs.folder import RunFolder

    if not options.evaluation.protocols:
        raise ValueError("without a run, --protocols says what to evaluate on: ucf101/EP2, or a .json file.")
    data = DataConfig(workers=options.workers, time_limit_s=options.time_limit_s)
    config = Config("evaluation", model=options.model, data=data, evaluation=options.evaluation)
    check(evaluation_ranges(config))
    protocols = build.protocols(config, ())  # a mistake is found before weights are fetched
    loaded = loading.of_file(options.weights, config.model) if options.weights else loading.of_model(config.model)
    if loaded.patched and any(config.evaluation.anchor_weights):
        Console().print(loading.twice(str(options.weights)), soft_wrap=True)
    if loaded.model != config.model:
        told = f"{options.weights} is a checkpoint of the published code: evaluated with edge={loaded.model.edge}."
        Console().print(told, soft_wrap=True)
        config = replace(config, model=loaded.model)
    evaluation = build.evaluation(loaded.source, config, protocols)
    folder = RunFolder(options.output)
    with alone_in(folder):
        report(folder, evaluation(loaded.anchor, loaded.theta, folder.logits), to_dict(config))
