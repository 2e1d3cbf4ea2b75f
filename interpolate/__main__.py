"""`python -m interpolate`: checkpoints mixed, looked at and checked from the command line.

Exit codes: 0 done (`diff`: equal), 1 `diff` or `verify` found something, 2 bad input or a file that can't be read or
written (one line on the standard error), 130 interrupted, 141 nobody reads what is printed any more. What a function
given to `--evaluate` raises is shown whole.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

from interpolate import files, inspection
from interpolate._arguments import EvaluateError, function_of, numbers, progress_line, ratio, ratios_last
from interpolate._operations import Ratio, is_mixed
from interpolate.checkpoints import Checkpoint
from interpolate.choosing import Choice, check_can_plot, check_held_out
from interpolate.depth import by_depth, towers
from interpolate.errors import WeightMismatchError
from interpolate.path import greedy_soup
from interpolate.reports import Report, as_json
from interpolate.searching import ANCHOR_WEIGHTS, KERNELS, choose, repair
from interpolate.snapshots import with_folders_opened
from interpolate.synthesis import average_snapshots, latest_first

_PATHS = (
    "a .safetensors file, the .safetensors.index.json of a sharded checkpoint, a file of torch.save, or a folder of "
    "Hugging Face or torch.distributed.checkpoint, local or a URL"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the return value is the exit code."""
    options = _parser().parse_args(ratios_last(sys.argv[1:] if arguments is None else arguments))
    try:
        if getattr(options, "plot", None):
            check_can_plot()
        return options.run(options)
    except EvaluateError as error:
        raise error.own from None
    except BrokenPipeError:  # who reads what is printed has enough, such as `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is flushed at the end
        return 128 + signal.SIGPIPE
    except (ValueError, OSError) as error:
        text = " ".join(str(error).split())
        if (
            isinstance(error, WeightMismatchError)
            and getattr(options, "anchor", None)
            and hasattr(options, "theta_only")
        ):
            text += " What the anchor does not have can be named: --theta-only PATTERN."
        print(f"interpolate {options.command}: {text}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"interpolate {options.command}: interrupted; no file was changed", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, prog="python -m interpolate", description="Mix checkpoints and look at them."
    )
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, allow_abbrev=False, help=text, description=f"{text} A checkpoint is {_PATHS}.")
        sub.set_defaults(run=run)
        sub.add_argument("--json", action="store_true", help="print the result as JSON")
        return sub

    def writes(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("-o", "--output", required=True, help="what to write: as a whole, or not at all")
        sub.add_argument("--dry-run", action="store_true", help="do everything except writing")

    def keeps(sub: argparse.ArgumentParser) -> None:
        text = "what theta has and the anchor has not, such as 'head.*' or, for new rows, 'embed.weight[32000:]'"
        sub.add_argument("--theta-only", action="append", default=[], metavar="PATTERN", help=text)

    def evaluates(sub: argparse.ArgumentParser, gives: str) -> None:
        text = f"called with name → tensor; gives {gives}, better the higher"
        sub.add_argument("--evaluate", required=True, metavar="MODULE:FUNCTION", help=text)

    def searches(sub: argparse.ArgumentParser) -> None:
        metrics = '{"new": ..., "kept": ...}' if sub.prog.endswith("repair") else "a metric, or several by name"
        evaluates(sub, f"{metrics}, each a number or one for each example")
        sub.add_argument("--data", required=True, metavar="NAME", help="what --evaluate uses; no test set")
        sub.add_argument("-o", "--output", help="write the chosen weights: as a whole, or not at all")
        sub.add_argument("--plot", metavar="FILE", help="draw what was found into an image; needs matplotlib")

    sub = command("patch", _patch, "Mix a fine-tuned checkpoint with the pretrained one.")
    sub.add_argument("anchor", help="the pretrained checkpoint")
    sub.add_argument("theta", help="the fine-tuned checkpoint")
    weights = sub.add_mutually_exclusive_group(required=True)
    weights.add_argument(
        "--anchor-weight",
        nargs="+",
        action="extend",
        metavar="W",
        help="weight of the anchor in [0, 1], or PATTERN=W ..., the first that fits a name; '*' is the rest",
    )
    weights.add_argument(
        "--by-depth",
        nargs=2,
        type=float,
        metavar=("FIRST", "LAST"),
        help="weight of the anchor in the first block of a network and in the last, in equal steps between (LiNeS)",
    )
    sub.add_argument("--extrapolate", action="store_true", help="let weights of the anchor be outside [0, 1]")
    keeps(sub)
    writes(sub)
    sub = command("average", _average, "Write the mean of checkpoints, or of the snapshots of a training.")
    sub.add_argument("checkpoints", nargs="+", help="the oldest first; a folder of snapshots stands for all in it")
    shares = sub.add_mutually_exclusive_group()
    shares.add_argument("--weights", metavar="A,B,...", help="how much each checkpoint weighs; only ratios matter")
    shares.add_argument("--kernel", help="or by its place in the training: uniform, power:0.1, exponential:5%%, ...")
    sub.add_argument("--last", type=int, metavar="N", help="take the latest N only")
    writes(sub)
    sub = command("soup", _soup, "Write the mean of those checkpoints that a greedy soup keeps.")
    sub.add_argument("checkpoints", nargs="+")
    evaluates(sub, "a number")
    writes(sub)
    sub = command(
        "choose", _choose, "Choose an average of a training's snapshots, and how much of the anchor to mix in."
    )
    sub.add_argument("snapshots", nargs="+", help="a folder of snapshots, or checkpoints, the oldest first")
    sub.add_argument("--anchor", help="the pretrained checkpoint; without it, averages alone are tried")
    searches(sub)
    keeps(sub)
    sub.add_argument("--kernel", nargs="+", action="extend", help=f"what to try (default {' '.join(KERNELS)})")
    sub.add_argument("--anchor-weights", nargs="+", type=float, metavar="W", help="what to try (default 0, 0.1, ... 1)")
    sub.add_argument("--last", type=int, metavar="N", help="take the latest N snapshots only")
    sub = command("repair", _repair, "Find weights between a tuned model and its anchor that keep the old and the new.")
    sub.add_argument("anchor", help="the pretrained checkpoint")
    sub.add_argument("theta", help="the fine-tuned checkpoint")
    searches(sub)
    keeps(sub)
    sub.add_argument("--points", type=int, default=11, help="how many weights of the anchor, from 0 to 1 (default 11)")
    sub = command("inspect", _inspect, "Show what is in a checkpoint.")
    sub.add_argument("checkpoint")
    sub = command(
        "diff",
        _diff,
        "Show how far two checkpoints are from each other; exit code 1 if they differ.",
    )
    sub.add_argument("checkpoints", nargs=2)
    sub = command("verify", _verify, "Check a written checkpoint against its recipe and inputs; exit code 1 if wrong.")
    sub.add_argument("checkpoint")
    return parser


def _patch(options: argparse.Namespace) -> int:
    report = files.patch_files(
        options.anchor,
        options.theta,
        options.output,
        anchor_weight=_by_depth(options) if options.by_depth else ratio(options.anchor_weight),
        extrapolate=options.extrapolate,
        theta_only=options.theta_only,
        dry_run=options.dry_run,
        progress=progress_line(),
    )
    return _show(options, report)


def _average(options: argparse.Namespace) -> int:
    paths, output = options.checkpoints, options.output
    how: dict[str, Any] = {"dry_run": options.dry_run, "progress": progress_line()}
    if options.weights is not None:
        weights = numbers("--weights", options.weights)[::-1]
        return _show(options, files.average_files(latest_first(paths, options.last), output, weights=weights, **how))
    if options.kernel is None and options.last is None and paths == with_folders_opened(paths):
        return _show(options, files.average_files(paths, output, **how))
    report = average_snapshots(
        paths, output, kernel="uniform" if options.kernel is None else options.kernel, last=options.last, **how
    )
    return _show(options, report)


def _soup(options: argparse.Namespace) -> int:
    chosen, value = greedy_soup(options.checkpoints, function_of(options.evaluate))
    paths = [options.checkpoints[i] for i in chosen]
    print(f"{len(paths)} of {len(options.checkpoints)} kept, value {value:.6g}", file=sys.stderr)
    return _show(options, files.average_files(paths, options.output, dry_run=options.dry_run, progress=progress_line()))


def _choose(options: argparse.Namespace) -> int:
    if options.anchor_weights is not None and options.anchor is None:
        raise ValueError("--anchor-weights weigh the anchor, and there is no --anchor.")
    evaluate = function_of(options.evaluate)
    check_held_out("the function of --evaluate", options.evaluate.rpartition(":")[2])
    choice = choose(
        options.snapshots,
        evaluate,
        data=options.data,
        anchor=options.anchor,
        kernels=options.kernel or KERNELS,
        anchor_weights=ANCHOR_WEIGHTS if options.anchor_weights is None else options.anchor_weights,
        last=options.last,
        theta_only=options.theta_only,
        progress=progress_line(),
    )
    return _chosen(options, choice)


def _repair(options: argparse.Namespace) -> int:
    evaluate = function_of(options.evaluate)
    check_held_out("the function of --evaluate", options.evaluate.rpartition(":")[2])
    how: dict[str, Any] = {"data": options.data, "points": options.points, "theta_only": options.theta_only}
    return _chosen(options, repair(options.anchor, options.theta, evaluate, progress=progress_line(), **how))


def _chosen(options: argparse.Namespace, choice: Choice) -> int:
    print(choice.as_json() if options.json else choice)  # first: what took hours to find is not lost with a wrong path
    if options.plot:
        choice.plot(options.plot)
    if options.output:
        choice.write(options.output, progress=progress_line())
    return 0


def _inspect(options: argparse.Namespace) -> int:
    report = inspection.inspect(options.checkpoint)
    if not options.json:
        for tensor in report.tensors:
            print(f"{tensor.dtype:>9}  {tensor.shape!s:20} {tensor.name}")
    return _show(options, report)


def _diff(options: argparse.Namespace) -> int:
    report = inspection.diff(*options.checkpoints)
    _show(options, report)
    return int(report.differs)


def _verify(options: argparse.Namespace) -> int:
    problems = inspection.verify(options.checkpoint)
    print(as_json({"problems": problems}) if options.json else "\n".join(problems) or "as its recipe says")
    return int(bool(problems))


def _show(options: argparse.Namespace, report: Report) -> int:
    print(report.as_json() if options.json else report)
    return 0


def _by_depth(options: argparse.Namespace) -> Ratio:
    """Patterns by the names in theta; what they are taken from is said."""
    first, last = options.by_depth
    with Checkpoint(options.theta) as theta:
        names = [name for name, entry in theta.entries.items() if is_mixed(name, entry.dtype)]
    for tower, blocks in towers(names, None).items():
        print(
            f"{len(blocks)} blocks under {tower!r}: {blocks[0]} ({first:g}) to {blocks[-1]} ({last:g})", file=sys.stderr
        )
    return by_depth(names, first=first, last=last)


if __name__ == "__main__":
    sys.exit(main())
