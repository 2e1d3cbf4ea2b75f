"""Train a video CLIP with interpolated weight optimization, and show what it gained and what it kept.

$ openvclip train                                    # the built-in miniature
$ openvclip train miniature --optimization.epochs 5
$ openvclip train --resume runs/miniature-…          # what was cut off goes on, with its own settings
$ openvclip train --help                             # recipes; and miniature --help: every field
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from applications.openvclip.config import FREE, Config, from_dict
from applications.openvclip.recipes import RECIPES
from applications.openvclip.runs.folder import RunFolder
from applications.openvclip.runs.lock import locked

if TYPE_CHECKING:
    from applications.openvclip.build import Run


def parse(arguments: Sequence[str]) -> Config:
    """A recipe by name (by default miniature), or the settings of a run to resume; fields overridden by options."""
    resuming = argparse.ArgumentParser(prog="openvclip train", add_help=False, allow_abbrev=False)
    resuming.add_argument("--resume", type=Path)
    resumed, arguments = resuming.parse_known_args(arguments)
    if resumed.resume is not None:
        settings = from_dict(RunFolder(resumed.resume).read_settings())
        overridden = tyro.cli(Config, prog="openvclip train", description=__doc__, args=arguments, default=settings)
        return replace(overridden, output=resumed.resume)
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help")):
        arguments = ["miniature", *arguments]
    recipes = {name: ((recipe.__doc__ or "").strip(), recipe()) for name, recipe in RECIPES.items()}
    return tyro.extras.overridable_config_cli(recipes, prog="openvclip train", description=__doc__, args=arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    config = parse(sys.argv[1:] if arguments is None else arguments)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("training runs in one process: start it without torchrun. Evaluation takes several.")
    from applications.openvclip import build  # torch and the like take seconds; --help must not wait for them

    run = build.run(config)
    try:
        with locked(run.folder.path) as former:
            if former:
                print(f"{run.folder.path}: taken over from {former}")
            train(run)
    except KeyboardInterrupt:
        print(f"`openvclip train --resume {run.folder.path}` goes on from the last whole epoch", file=sys.stderr)
        raise


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
    changed = folder.open_for_training(run.settings, FREE)
    console.print(f"run: {folder.path}", soft_wrap=True)
    run.journal.write("start", **provenance(), config=run.settings, changed=changed)
    torch.manual_seed(run.settings["seed"])

    faulty: dict[str, set[str]] = {"unreadable": set(), "cut-off": set()}

    def on_fault(fault: str, location: str, reason: str) -> None:
        if location not in faulty[fault]:
            run.journal.write(fault, video=location, reason=reason)
            faulty[fault].add(location)

    trainer.resume(folder.training_state)
    batches = run.batches(replace(run.order, first_step=trainer.step), on_fault)
    trainer.fit(batches, steps_per_epoch=run.order.steps_per_epoch, checkpoint=folder.training_state)
    for fault, what in (
        ("unreadable", "could not be read and were replaced by others"),
        ("cut-off", "are cut off and were used as far as they go"),
    ):
        if faulty[fault]:
            console.print(f"{len(faulty[fault])} videos {what}: see {folder.journal}", soft_wrap=True)

    theta, weight = trainer.averager.weights, run.settings["evaluation"]["anchor_weight"]
    metadata = {
        "anchor": fingerprint(run.anchor),
        "seed": str(run.settings["seed"]),
        "classes": json.dumps(run.clips.manifest.classes),
    }
    whole = run.clip.state_dict()  # with the text tower, so that it loads wherever such a CLIP does
    save_weights(folder.averaged, whole | theta, metadata | {"content": "mean of the fine-tuned weights"})
    patched = patch(run.anchor, theta, anchor_weight=weight)
    save_weights(folder.patched, whole | patched, metadata | {"content": f"patched, anchor weight {weight:g}"})
    report(folder, run.evaluation(run.anchor, theta, folder.logits), run.settings)
    run.journal.write("end")
