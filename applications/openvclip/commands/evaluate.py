"""Evaluate a finished run again, or weights from elsewhere: all protocols and anchor weights, each video decoded once.

$ openvclip evaluate runs/miniature-… --anchor-weights 0.3 0.5 0.7       # its options: openvclip evaluate RUN --help
$ openvclip evaluate --weights swa_2_22.pth --model.name ViT-B-16 --model.pretrained openai
    --protocols ucf101/EP1 ucf101/EP2 ucf101/EP3 --videos ucf101 UCF-101 --lists ucf101 zs_label_db
$ torchrun --nproc-per-node 8 -m applications.openvclip.evaluate …       # processes share the videos
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import tyro

from applications.openvclip.commands.evaluate_run import OfRun, evaluate_run
from applications.openvclip.commands.evaluate_weights import OfWeights, evaluate_weights


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments and not arguments[0].startswith("-"):
        run = Path(arguments.pop(0))
        of_run = tyro.cli(OfRun, prog=f"openvclip evaluate {run}", args=arguments)
        with_processes(lambda: evaluate_run(run, of_run))
    else:
        of_weights = tyro.cli(OfWeights, prog="openvclip evaluate", description=__doc__, args=arguments)
        with_processes(lambda: evaluate_weights(of_weights))


def with_processes(evaluate: Callable[[], None]) -> None:
    """Evaluate with the other processes that torchrun has started."""
    from applications.openvclip import distributed  # brings torch, for which --help must not wait

    distributed.initialise()
    try:
        evaluate()
    finally:
        distributed.finish()
