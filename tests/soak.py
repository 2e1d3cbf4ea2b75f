"""Train for a while, and see that memory, open files and threads stay what they are.

$ python -m tests.soak --minutes 30

A real run in a process of its own, with everything that goes on beside the steps: reading processes, checkpoints every
few steps, evaluations, curves, TensorBoard. It is measured from outside, and stopped as a scheduler would stop it.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from applications.openvclip.runs.journal import read_journal
from tests.openvclip.files import write_small_world

_EVERY_S = 1.0
_GROWTH = 1.05
"""Of the least memory, from the second quarter of the time to the last."""
_MORE = 2
"""Open files and threads likewise."""


def soak(minutes: float, folder: Path) -> dict[str, list[float]]:
    """The least that a run of so many minutes held in each quarter of the time, by kind, from the first step on.

    The least, as checkpoints, evaluations and drawings that are under way come and go; what is lost stays.
    """
    world = write_small_world(folder / "world")
    command = [
        *(sys.executable, "-m", "applications.openvclip.train", "miniature", "--output", str(folder / "run")),
        *("--data.train", str(world["train"]), "--data.test", str(world["closed"]), str(world["zs_object"])),
        *("--optimization.epochs", "100000", "--optimization.batch-size", "4", "--data.workers", "2"),
        *("--checkpoint.every-steps", "20", "--in-training.every-epochs", "20", "--in-training.held-out", "zs_object"),
        "--tensorboard",
    ]
    journal = folder / "run" / "journal.jsonl"
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None and not (journal.exists() and b'"step"' in journal.read_bytes()):
                time.sleep(_EVERY_S)
            samples, end = [], time.monotonic() + 60 * minutes
            while process.poll() is None and time.monotonic() < end:
                samples.append(_sample(process.pid))
                time.sleep(_EVERY_S)
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=300)
        finally:
            process.kill()
            process.wait()
    assert process.returncode == 0, (folder / "log.txt").read_text()[-2000:]
    quarters = [samples[i * len(samples) // 4 : (i + 1) * len(samples) // 4] for i in range(4)]
    return {kind: [min(s[kind] for s in quarter) for quarter in quarters] for kind in samples[0]}


def assert_steady(held: dict[str, list[float]]) -> None:
    for kind, (_, second, _, last) in held.items():
        limit = second * _GROWTH if kind.endswith("_mb") else second + _MORE
        assert last <= limit, f"{kind} grew from {second:g} to {last:g} (quarters: {held[kind]})"


def _sample(pid: int) -> dict[str, float]:
    """Of a process: its memory and its children's, in MB, its open files and its threads."""
    own = _status(pid)
    children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return {
        "memory_mb": own["VmRSS"] / 1024,
        "childrens_memory_mb": sum(_status(child).get("VmRSS", 0) for child in children) / 1024,
        "open_files": len(list(Path(f"/proc/{pid}/fd").iterdir())),
        "threads": own["Threads"],
    }


def _status(pid: int) -> dict[str, int]:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):  # it has just ended
        return {}
    pairs = (line.split(":", 1) for line in lines)
    return {name: int(value.split()[0]) for name, value in pairs if name in ("VmRSS", "Threads")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    minutes = parser.parse_args().minutes
    with tempfile.TemporaryDirectory() as folder:
        held = soak(minutes, Path(folder))
        events = [event["event"] for event in read_journal(Path(folder) / "run" / "journal.jsonl")]
    counts = {name: events.count(name) for name in ("step", "checkpoint", "evaluation")}
    print(json.dumps({"minutes": minutes, "least_by_quarter": held, "events": counts}, indent=2))
    assert_steady(held)


if __name__ == "__main__":
    main()
