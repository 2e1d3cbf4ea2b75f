"""Ranks that die, hang or fail, under torchrun: the others end and name them."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from applications.openvclip.training.watch import Watch

_TRAINING = """
import os, signal, sys, time
import torch, torch.distributed as dist
from applications.openvclip.training.interruption import Interruption
from applications.openvclip.training.watch import Watch

def fault(rank, step):
    if (rank, step) != (1, 3):
        return
    {fault}

dist.init_process_group("gloo")
rank = dist.get_rank()
with Interruption() as interruption, Watch(limit_s={limit_s}) as watch:
    for step in range(1, 6):
        watch.step(step)
        fault(rank, step)
        dist.all_reduce(torch.ones(1))
print(f"rank {{rank}} has finished\\n", end="", flush=True)
dist.destroy_process_group()
"""


@contextmanager
def training(tmp_path: Path, fault: str, *, n: int, limit_s: float) -> Iterator[subprocess.Popen[str]]:
    script = tmp_path / "training.py"
    script.write_text(_TRAINING.format(fault=fault, limit_s=limit_s))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n), str(script)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # without it torchrun says that it sets it
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment) as run:
        try:
            yield run
        finally:
            run.kill()


def told(run: subprocess.Popen[str]) -> set[str]:
    """What it says of steps and ranks, without torchrun's prefix and the kinds of errors."""
    lines = run.communicate(timeout=300)[0].splitlines()
    return {line[line.index("step 3") :] for line in lines if "step 3" in line and "rank" in line}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "n", "expected"),
    [
        ("raise ValueError('a bad thing')", 3, r"step 3: rank 1 ended with ValueError: a bad thing\."),
        (
            "time.sleep(2); os.kill(os.getpid(), signal.SIGKILL)",
            3,
            r"step 3: rank 1 does not answer \(last sign \d+ s ago, .*\)\.",
        ),
        (
            "time.sleep(2); os.kill(os.getpid(), signal.SIGSTOP)",  # after a first sign of life
            2,
            r"step 3 took longer than 8 s: rank 1 does not answer \(last sign \d+ s ago, in step \d, .*\)\.",
        ),
        (
            "time.sleep(1000)",
            2,
            r"step 3 took longer than 8 s: every rank answers: rank 0 in step 3, training\.py:18 in <module> on \S+; "
            r"rank 1 in step 3, training\.py:10 in fault on \S+\.",
        ),
        ("sys.exit()", 2, r"step 3: rank 1 ended with SystemExit: \."),
    ],
)
def test_the_others_end_and_name_the_rank(tmp_path: Path, fault: str, n: int, expected: str) -> None:
    with training(tmp_path, fault, n=n, limit_s=8) as run:
        lines = told(run)
    assert run.returncode == 1
    assert lines
    assert all(re.fullmatch(expected, line) for line in lines), lines


@pytest.mark.slow
def test_ranks_that_finish_one_after_the_other_are_no_fault(tmp_path: Path) -> None:
    with training(tmp_path, "time.sleep(4)", n=2, limit_s=8) as run:
        output = run.communicate(timeout=300)[0]
    assert run.returncode == 0
    assert sorted(output.split("\n")) == ["", "rank 0 has finished", "rank 1 has finished"]


@pytest.mark.slow
def test_ranks_end_with_torchrun(tmp_path: Path) -> None:
    """Nobody else would end them, and the folder of the run would stay taken."""
    fault = """print(os.getppid(), flush=True)
    while not interruption.signal:
        time.sleep(0.1)
    sys.exit()"""
    with training(tmp_path, fault, n=2, limit_s=1000) as run:
        assert run.stdout is not None
        assert int(run.stdout.readline()) == run.pid
        run.kill()
        output = run.stdout.read()  # until the ranks, which write to the same pipe, are gone
    assert ": torchrun does not answer (" in output


def test_a_single_process_is_not_watched() -> None:
    with Watch(limit_s=1e-9) as watch:
        watch.step(1)
        watch.step(2)
        error = RuntimeError("Connection closed by peer")
        assert watch.explained(error) is error
    with pytest.raises(ValueError, match="must be positive, got nan s"):
        Watch(float("nan"))
