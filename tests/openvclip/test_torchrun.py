"""A whole run of the video encoder under torchrun is that of one process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from applications.openvclip.miniature import tiny_clip
from applications.openvclip.runs.journal import read_journal
from tests.openvclip.steps import distance_as_seen
from tests.openvclip.test_commands import arguments

pytestmark = pytest.mark.slow


def trained(n: int, small_world: dict[str, Path], folder: Path, *more: str) -> Path:
    train(n, arguments(small_world, folder, "--optimization.micro-batch", "1", *more))
    return folder


def train(n: int, options: list[str]) -> str:
    """What it prints."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n)]
    command += ["-m", "applications.openvclip.train", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE, text=True).stdout


@pytest.mark.parametrize(
    ("n", "more"),
    [
        (2, ()),
        (3, ("--in-training.every-epochs", "1")),
        (2, ("--regularizer.alpha-per", "step")),
        (2, ("--regularizer.alpha-per", "step", "--parallel", "fsdp2", "--activation-checkpointing")),
    ],
    ids=["ddp", "ddp, uneven", "one alpha", "fsdp2"],
)
def test_a_run_is_the_same_on_any_number_of_processes(
    n: int, more: tuple[str, ...], small_world: dict[str, Path], tmp_path: Path
) -> None:
    alone = trained(1, small_world, tmp_path / "alone", *more[:2])
    together = trained(n, small_world, tmp_path / "together", *more)
    losses = [
        [event["loss"] for event in read_journal(folder / "journal.jsonl") if event["event"] == "step"]
        for folder in (alone, together)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    evaluations = [
        [event["accuracy"] for event in read_journal(folder / "journal.jsonl") if event["event"] == "evaluation"]
        for folder in (alone, together)
    ]
    assert len(evaluations[0]) == (3 if "--in-training.every-epochs" in more else 0)
    assert evaluations[1] == evaluations[0]
    beginning = {name: p.detach() for name, p in tiny_clip.load().named_parameters() if name.startswith("visual.")}
    for kind in ("last", "averaged"):
        expected, found = (load_file(folder / f"{kind}.safetensors") for folder in (alone, together))
        moved = distance_as_seen(expected, beginning)
        assert moved > 0.1
        # rounding alone comes near 1e-5 of it: AdamW makes whole steps of gradients that are hardly more than that
        assert distance_as_seen(found, {name: expected[name] for name in beginning}) < 1e-4 * moved
    protocols = [json.loads((folder / "results.json").read_text())["protocols"] for folder in (alone, together)]
    assert protocols[0]["closed"]["accuracy"]["0"] == protocols[1]["closed"]["accuracy"]["0"]


def test_a_dry_run_of_processes_is_told_once_and_leaves_nothing(small_world: dict[str, Path], tmp_path: Path) -> None:
    printed = train(2, arguments(small_world, tmp_path / "run", "--optimization.micro-batch", "1", "--dry-run"))
    lines = printed.splitlines()
    said = [line.partition(":")[0] for line in lines]
    assert said[:3] == ["parameters", "a step", "memory counted, GB, by the clips at once"]
    assert len(set(lines)) == len(lines)
    once = [label for label in said if label != "faster"]  # of which a slow machine may be told two
    assert len(set(once)) == len(once)
    assert printed.count("trained, on 2 x ") == printed.count("micro-batches of 1") == 1
    assert not (tmp_path / "run").exists()
