"""Runs of training as processes of their own, which can be killed with all that they have started."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from applications.openvclip.runs.journal import read_journal

TIME_LIMIT_S = 600


def arguments(world: dict[str, Path], output: Path, *more: str) -> list[str]:
    """A run of steps of two micro-batches, 4 an epoch, which saves every other step."""
    return [
        *("miniature", "--output", str(output), "--data.train", str(world["train"]), "--data.test"),
        *(str(world["closed"]), "--evaluation.anchor-weights", "0.5", "--data.workers", "1"),
        *("--optimization.batch-size", "4", "--optimization.micro-batch", "2", "--averager.start-epoch", "1"),
        *("--checkpoint.every-steps", "2", *more),
    ]


def started(arguments: list[str], n: int = 1, *options: str) -> subprocess.Popen[str]:
    """A run on n processes, all that it prints in one pipe."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n), *options] if n > 1 else []
    command = [sys.executable, *torchrun, "-m", "applications.openvclip.train", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


@contextmanager
def running(arguments: list[str], n: int = 1, *options: str) -> Iterator[subprocess.Popen[str]]:
    with started(arguments, n, *options) as run:
        try:
            yield run
        finally:
            kill(run)


def finished(arguments: list[str], n: int = 1, *options: str) -> str:
    """What a run that ends well prints."""
    with running(arguments, n, *options) as run:
        printed = run.communicate(timeout=TIME_LIMIT_S)[0]
    assert run.returncode == 0, printed
    return printed


def family(pid: int) -> list[int]:
    """A process and all that it has started, itself or by others."""
    with suppress(FileNotFoundError, ProcessLookupError):
        threads = Path(f"/proc/{pid}/task").iterdir()
        children = [int(child) for thread in threads for child in (thread / "children").read_text().split()]
        return [pid, *(p for child in children for p in family(child))]
    return []


def environment(pid: int) -> dict[str, str]:
    entries = Path(f"/proc/{pid}/environ").read_text().split("\0")
    return dict(entry.split("=", 1) for entry in entries if "=" in entry)


def ranks(run: subprocess.Popen[str]) -> dict[int, int]:
    """Process of each rank."""
    found = {}
    for pid in reversed(family(run.pid)):  # parents last: what a rank has started has its environment
        if "RANK" in environment(pid):
            found[int(environment(pid)["RANK"])] = pid
    return found


def kill(run: subprocess.Popen[str]) -> None:
    """As the end of a machine does: everything at once, without a warning."""
    for pid in family(run.pid):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def n_steps(folder: Path) -> int:
    """Steps that the journal tells of since the last start."""
    with suppress(FileNotFoundError):
        events = [event["event"] for event in read_journal(folder / "journal.jsonl")]
        return events[len(events) - events[::-1].index("start") :].count("step") if "start" in events else 0
    return 0


def wait_for_steps(run: subprocess.Popen[str], folder: Path, n: int, *, start: int = 1) -> None:
    """Until a run has taken n steps since its start of this number, by the journal of its folder."""
    deadline = time.monotonic() + TIME_LIMIT_S
    while n_starts(folder) < start or n_steps(folder) < n:
        assert run.poll() is None, run.stdout and run.stdout.read()
        assert time.monotonic() < deadline, "the run takes no steps"
        time.sleep(0.02)


def kill_at_random(run: subprocess.Popen[str], folder: Path, start: int, generator: random.Random) -> str:
    """Kill a run: while it starts, between two steps or within one, or while it writes a checkpoint; says when."""
    how = generator.choice(["starting", "training", "writing", "writing"])
    if how == "starting":
        time.sleep(generator.uniform(0, 10))
    else:
        wait_for_steps(run, folder, generator.randint(2, 5), start=start)
        while how == "writing" and not list((folder / "checkpoints").glob(".interpolate-*")) and run.poll() is None:
            time.sleep(0.0005)
        time.sleep(generator.uniform(0, 0.02 if how == "writing" else 0.5))
    kill(run)
    run.communicate()
    return how


def n_starts(folder: Path) -> int:
    with suppress(FileNotFoundError):
        return sum(event["event"] == "start" for event in read_journal(folder / "journal.jsonl"))
    return 0


def killed(arguments: list[str], folder: Path, kills: int, n: int, generator: random.Random) -> list[tuple[str, int]]:
    """Train with as many kills, and then to the end; says of each when it came, and how many steps were taken."""
    came = []
    for _ in range(kills):
        start = n_starts(folder) + 1
        with started(arguments, n) as run:
            how = kill_at_random(run, folder, start, generator)
        litter = len(list((folder / "checkpoints").glob(".interpolate-*")))
        came.append((how + (" (unfinished)" if litter else ""), n_steps(folder)))
    finished(arguments, n)
    return came


def outcome(folder: Path) -> dict[str, Any]:
    """What must be the same however a run came about."""
    events = [
        {name: value for name, value in event.items() if name in _REPEATABLE}
        for event in read_journal(folder / "journal.jsonl")
        if event["event"] in ("step", "checkpoint", "end")
    ]
    results = json.loads((folder / "results.json").read_text())
    return {
        "journal": events,
        "accuracy": {name: found["accuracy"] for name, found in results["protocols"].items()},
        **{name: load_file(folder / f"{name}.safetensors") for name in ("last", "averaged", "patched")},
    }


_REPEATABLE = ("event", "step", "loss", "interpolated_loss", "gradient_norm", "alpha", "learning_rate", "distance")


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Where two outcomes are not the same to the last bit."""
    texts = [name for name in ("journal", "accuracy") if a[name] != b[name]]
    for name in ("last", "averaged", "patched"):
        assert a[name].keys() == b[name].keys()
        texts += [f"{name}: {key}" for key, tensor in a[name].items() if not torch.equal(tensor, b[name][key])]
    return texts
