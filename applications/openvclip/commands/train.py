"""Train a video CLIP with interpolated weight optimization, and show what it gained and what it kept.

$ openvclip train                                    # the built-in miniature
$ openvclip train miniature --optimization.epochs 5
$ openvclip train --help                             # recipes; and miniature --help: every field
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import tyro

from applications.openvclip.config import Config
from applications.openvclip.recipes import RECIPES

if TYPE_CHECKING:
    from applications.openvclip.build import Run


def parse(arguments: Sequence[str]) -> Config:
    """A recipe by name (by default miniature), its fields overridden by options."""
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help")):
        arguments = ["miniature", *arguments]
    recipes = {name: ((recipe.__doc__ or "").strip(), recipe()) for name, recipe in RECIPES.items()}
    return tyro.extras.overridable_config_cli(recipes, prog="openvclip train", description=__doc__, args=arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    config = parse(sys.argv[1:] if arguments is None else arguments)
    from applications.openvclip import build  # torch and the like take seconds; --help must not wait for them

    try:
        train(build.run(config))
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command with --output and the run's folder goes on from the last whole epoch")


def train(run: Run) -> None:
    """Fine-tune, average, patch and evaluate; an unfinished run in the same folder is continued."""
    import torch
    from rich.console import Console

    from applications.openvclip.commands.report import report
    from applications.openvclip.runs.provenance import provenance
    from applications.openvclip.runs.weights import fingerprint, save_weights
    from interpolate import patch

    console = Console()
    folder, trainer = run.folder, run.trainer
    folder.open_for_training(run.settings)
    console.print(f"run: {folder.path}", soft_wrap=True)
    run.journal.write("start", **provenance(), config=run.settings)
    torch.manual_seed(run.settings["seed"])

    replaced: dict[str, str] = {}

    def on_unreadable(location: str, reason: str) -> None:
        if location not in replaced:
            run.journal.write("unreadable", video=location, reason=reason)
        replaced[location] = reason

    trainer.resume(folder.training_state)
    batches = run.batches(replace(run.order, first_step=trainer.step), on_unreadable)
    trainer.fit(batches, steps_per_epoch=run.order.steps_per_epoch, checkpoint=folder.training_state)
    if replaced:
        count = f"{len(replaced)} videos could not be read and were replaced by others"
        console.print(f"{count}: see {folder.journal}", soft_wrap=True)

    theta, weight = trainer.averager.weights, run.settings["evaluation"]["anchor_weight"]
    metadata = {
        "anchor": fingerprint(run.anchor),
        "seed": str(run.settings["seed"]),
        "classes": json.dumps(run.clips.manifest.classes),
    }
    save_weights(folder.averaged, theta, metadata | {"content": "mean of the fine-tuned weights"})
    patched = patch(run.anchor, theta, anchor_weight=weight)
    save_weights(folder.patched, patched, metadata | {"content": f"patched, anchor weight {weight:g}"})
    report(folder, run.evaluation(run.anchor, theta, folder.logits), run.settings)
    run.journal.write("end")
