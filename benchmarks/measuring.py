"""What the benchmark scripts share: interleaved timing, and a result file that says how it came about."""

from __future__ import annotations

import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from applications.openvclip.runs.provenance import commit, versions

RESULTS = Path(__file__).parent / "results"


def interleaved(
    contenders: dict[str, Callable[[], object]], runs: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each run, one of every contender in turn, after one that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for run in range(runs + 1):
        for name, contender in contenders.items():
            start = clock()
            contender()
            if run:
                seconds[name].append(clock() - start)
    return seconds


def alone(module: str, function: str, *arguments: str) -> float:
    """The value of a script's function in a process of its own."""
    code = f"import {module}; print({module}.{function}(*{arguments!r}))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent)
    return float(done.stdout.split()[-1])


def ratios(seconds: dict[str, list[float]], reference: str) -> dict[str, dict[str, float]]:
    """Each contender's time over the reference's of the same round: median, lower and upper quartile."""
    found = {}
    for name, values in seconds.items():
        ratio = [a / b for a, b in zip(values, seconds[reference], strict=True)]
        low, median, high = statistics.quantiles(ratio, n=4)
        found[name] = {"median": round(median, 3), "quartile_1": round(low, 3), "quartile_3": round(high, 3)}
    return found


def save(name: str, results: dict[str, Any]) -> None:
    """Write `results/<name>.json` and print it."""
    described = Path("/proc/cpuinfo").read_text().splitlines() if os.path.exists("/proc/cpuinfo") else []
    cpu = next((line.partition(": ")[2] for line in described if line.startswith("model name")), platform.processor())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    record = {
        "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "commit": commit(),
        "versions": versions(),
        "hardware": {"cpu": cpu, "cores": os.cpu_count(), "memory_gb": round(memory / 1e9, 1)},
        "load_average": [round(load, 1) for load in os.getloadavg()],  # itself included
        "torch_threads": torch.get_num_threads(),
        "malloc": {k: v for k, v in os.environ.items() if k.startswith("MALLOC_")} or "default",
        "seed": 0,  # of every script
        **results,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))
