"""Train a video CLIP with interpolated weight optimization, and show what it gained and what it kept.

$ openvclip train                                    # the built-in miniature
$ openvclip train miniature --optimization.epochs 5
$ openvclip train --resume runs/miniature-…          # what was stopped goes on, with its own settings
$ openvclip train --resume runs/miniature-… --finish # or ends where it is: averaged, patched and evaluated
$ torchrun --nproc-per-node 8 -m applications.openvclip.train vit_b_16 …
$ openvclip train vit_b_16 … --dry-run               # a few steps: memory, speed, hours, and what would be faster
$ openvclip train --help                             # recipes; and miniature --help: every field
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from applications.openvclip.config import Config, free, from_dict, to_dict
from applications.openvclip.recipes import RECIPES
from applications.openvclip.runs.folder import RunFolder

if TYPE_CHECKING:
    from applications.openvclip.training_run import Run


def parse(arguments: Sequence[str]) -> Config:
    """A recipe by name (by default miniature), or the settings of a run to resume; fields overridden by options."""
    options, arguments = split(arguments)
    if options.resume is not None:
        settings = from_dict(RunFolder(options.resume).read_settings())
        overridden = tyro.cli(Config, prog="openvclip train", description=__doc__, args=arguments, default=settings)
        if overridden.output not in (settings.output, options.resume):
            raise ValueError(
                f"--output {overridden.output}: a run goes on in its own folder, {options.resume}; copy it, and resume "
                "the copy."
            )
        return replace(overridden, output=options.resume)
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help")):
        arguments = ["miniature", *arguments]
    recipes = {name: ((recipe.__doc__ or "").strip(), recipe()) for name, recipe in RECIPES.items()}
    return tyro.extras.overridable_config_cli(recipes, prog="openvclip train", description=__doc__, args=arguments)


def split(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """What is no part of a configuration: a run to `resume`, whether to `finish` it, a `dry_run`; and the rest."""
    parser = argparse.ArgumentParser(prog="openvclip train", add_help=False, allow_abbrev=False)
    parser.add_argument("--resume", type=Path)
    parser.add_argument("--finish", action="store_true")
    parser.add_argument("--dry-run", action="store_true")
    options, rest = parser.parse_known_args(arguments)
    if options.finish and options.resume is None:
        raise ValueError("--finish ends a run that was stopped: say which with --resume RUN.")
    return options, rest


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    config, (options, _) = parse(arguments), split(arguments)
    # torch and the like take seconds, for which --help must not wait
    from applications.openvclip import distributed, training_run
    from applications.openvclip.commands.dry_run import dry_run
    from applications.openvclip.commands.report import alone_in
    from applications.openvclip.training.interruption import heeded

    for number in heeded():  # what is not a step of training is interrupted as by Ctrl-C
        signal.signal(number, signal.default_int_handler)
    distributed.initialise()
    is_first, run, stopped = distributed.rank() == 0, None, None
    try:
        if options.dry_run:
            return dry_run(config)
        run = training_run.run(config)
        with alone_in(run.folder):
            stopped = train(run, finish=options.finish)
    except KeyboardInterrupt:
        if run is None or not run.folder.config.exists():
            raise  # nothing has begun
        stopped = "an interrupt"
    finally:
        distributed.finish()
    if stopped and is_first:
        print(f"stopped by {stopped}. It goes on with\n  {continuation(run.folder.path, finish=options.finish)}")


def continuation(folder: Path, *, finish: bool) -> str:
    """The command that goes on with a run, on as many processes as this one; any other number will do."""
    processes = os.environ.get("LOCAL_WORLD_SIZE", "1")
    module = ["torchrun", "--nproc-per-node", processes, "-m", "applications.openvclip.train"]
    program = ["openvclip", "train"] if processes == "1" else module
    return shlex.join([*program, "--resume", str(folder), *(["--finish"] if finish else [])])


def train(run: Run, *, finish: bool = False) -> str | None:
    """Fine-tune, average, patch and evaluate; an unfinished run in the same folder is continued.

    Args:
        run: What it takes.
        finish: Whether to take no more steps.

    Returns:
        The signal that stopped it; None at its end.
    """
    from rich.console import Console

    from applications.openvclip import distributed
    from applications.openvclip.commands.conclusion import conclude
    from applications.openvclip.training.interruption import Interruption

    trainer, folder = run.trainer, run.folder
    console = Console(quiet=distributed.rank() > 0)
    changed = distributed.on_first(lambda: opened(run, finish=finish))
    console.print(f"run: {folder.path}", soft_wrap=True)
    trainer.resume()
    trainer.evaluated |= distributed.on_first(lambda: begun(run, changed))
    with trainer.monitor or nullcontext(), trainer.profile or nullcontext():
        if not finish:
            with Interruption() as interruption:
                stopped = trainer.fit(run.micro_batches(trainer.step.taken), interruption)
            if stopped:
                return stopped
    conclude(run)
    return None


def begun(run: Run, changed: list[str]) -> set[int]:
    """Keep the settings, and have the journal begin where the run does: at its start or the step it goes on from.

    Returns:
        The steps after which there has been an evaluation.
    """
    from applications.openvclip.runs.journal import read_journal
    from applications.openvclip.runs.provenance import provenance

    taken = run.trainer.step.taken
    run.folder.write_settings(to_dict(run.config))
    run.journal.cut(taken)
    run.journal.write("start", **provenance(), step=taken, config=to_dict(run.config), changed=changed)
    events = read_journal(run.journal.path)
    run.trainer.reported |= {(event["event"], event["video"]) for event in events if "video" in event}
    return {event["step"] for event in events if event["event"] == "evaluation"}


def opened(run: Run, *, finish: bool) -> list[str]:
    """Make the run's folder, or see that it may go on there: the settings in which it then differs.

    Raises:
        FileExistsError: It holds something else, or a run that has ended.
        ValueError: There is nothing to finish.
    """
    steps, last = run.trainer.checkpoints.steps(), run.order.last_step
    if steps and steps[-1] > last:
        raise ValueError(f"--optimization.epochs: the run has taken {steps[-1]} steps, and there are {last} of them.")
    if finish and not steps:
        raise ValueError(f"{run.folder.path} has no checkpoint yet: there is nothing to finish.")
    goes_on = bool(steps) and steps[-1] < last
    return run.folder.open_for_training(to_dict(run.config), free(run.config), goes_on=goes_on)
