"""The paper's figures again: the published weights under its protocols, and the difference.

$ openvclip reproduce B/16 --weights swa_2_22.pth --videos ucf101 UCF-101 hmdb51 HMDB-51 kinetics600 k600/val
    --lists ucf101 zs_label_db hmdb51 zs_label_db kinetics600 zs_label_db
$ torchrun --nproc-per-node 8 -m applications.openvclip reproduce …      # processes share the videos

Without --weights it is CLIP* alone. All protocols are measured of which there are videos, each video decoded once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro

from applications.openvclip.commands.evaluate import with_processes
from applications.openvclip.commands.evaluate_weights import OfWeights, evaluate_weights
from applications.openvclip.config import EvaluationConfig, ModelConfig
from applications.openvclip.recipes import vit_b_16, vit_b_32, vit_l_14
from applications.openvclip.runs.folder import RunFolder
from applications.openvclip.runs.texts import write_text

RECIPE_OF = {"B/32": vit_b_32, "B/16": vit_b_16, "L/14": vit_l_14}


@dataclass(frozen=True)
class Reproduce:
    """What to measure, and where its files are."""

    model: tyro.conf.Positional[Literal["B/32", "B/16", "L/14"]]
    """Which of the paper's three."""
    weights: str | None = None
    """The published checkpoint, a path or URL."""
    videos: dict[str, str] = field(default_factory=dict)
    """Where the videos of each data set are: ucf101 FOLDER hmdb51 FOLDER kinetics600 FOLDER kinetics400 FOLDER."""
    lists: dict[str, str] = field(default_factory=dict)
    """Where the lists of each data set are; the paper's own are zs_label_db of its release."""
    pretrained: str = "openai"
    """Weights of CLIP: a tag of open_clip, or a file."""
    output: Path | None = None
    """Folder of logits and results; by default runs/reproduce-MODEL."""
    unreadable: Literal["wrong", "left-out"] = "wrong"
    """What a video is that can't be read: a wrong answer, or no part of the set."""
    precision: Literal["fp32", "tf32", "bf16", "fp16"] = "fp32"
    """In which numbers scores are computed."""
    compile: bool = False
    """Whether to compile the model first."""
    batch_size: int = 16
    """Videos at a time."""
    workers: int = 2
    """Processes that decode videos."""
    time_limit_s: float = 60.0
    """Seconds that reading one video may take."""


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = tyro.cli(Reproduce, prog="openvclip reproduce", description=__doc__, args=arguments)
    with_processes(lambda: reproduce(options))


def reproduce(options: Reproduce) -> None:
    """Evaluate under every protocol of the paper of which there are videos, and compare.

    Raises:
        ValueError: There are videos of no data set of the paper, or of one that it does not have.
    """
    from rich.console import Console

    from applications.openvclip import distributed
    from applications.openvclip.zeroshot import tables
    from applications.openvclip.zeroshot.protocols import REGISTRY
    from applications.openvclip.zeroshot.results import read_results

    data_sets = dict.fromkeys(name.partition("/")[0] for name in REGISTRY)
    if not options.videos or not options.videos.keys() <= data_sets.keys():
        named = ", ".join(options.videos) or "nothing"
        raise ValueError(f"--videos says where videos are of {', '.join(data_sets)}; it names {named}.")
    recipe = RECIPE_OF[options.model]()
    folder = RunFolder(options.output or Path("runs") / f"reproduce-{options.model.replace('/', '-')}")
    weight = recipe.evaluation.anchor_weight
    evaluation = EvaluationConfig(
        protocols=tuple(name for name in REGISTRY if name.partition("/")[0] in options.videos),
        videos=options.videos,
        lists=options.lists,
        anchor_weight=weight,
        anchor_weights=(weight,),
        unreadable=options.unreadable,
        precision=options.precision,
        compile=options.compile,
        batch_size=options.batch_size,
    )
    evaluate_weights(
        OfWeights(
            weights=options.weights,
            model=ModelConfig(name=recipe.model.name, pretrained=options.pretrained),
            output=folder.path,
            evaluation=evaluation,
            workers=options.workers,
            time_limit_s=options.time_limit_s,
        )
    )
    if distributed.rank() == 0:
        text = tables.beside_the_published(read_results(folder.results))
        path = folder.path / "reproduction.md"
        write_text(path, text)
        Console().print(f"\n{text}\nthis table: {path}", soft_wrap=True, highlight=False, markup=False)
