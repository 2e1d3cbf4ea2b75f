"""`openvclip train RECIPE … --dry-run`: a few steps on one's own data, and what the whole run would take."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from applications.openvclip.config import Config

if TYPE_CHECKING:
    import torch

    from applications.openvclip.training.planning import Pace
    from applications.openvclip.training_run import Run

STEPS = 3
AT_ONCE = (1, 2, 4, 8)
_CLIPS_TIMED = 8


def dry_run(config: Config) -> None:
    """Build everything, take a step to warm up and three that count, and say what they tell; nothing is left behind.

    Raises:
        ValueError: The run is too short to be tried.
    """
    from rich.console import Console

    from applications.openvclip import distributed, training_run

    with TemporaryDirectory() as folder:
        run = training_run.run(replace(config, output=Path(distributed.on_first(lambda: folder)) / "run"))
        if run.order.last_step < 1 + STEPS:
            raise ValueError(f"--dry-run takes {1 + STEPS} steps, and the whole run has {run.order.last_step}.")
        console = Console(quiet=distributed.rank() > 0)
        for line in report(run, pace_of(run)):
            console.print(line, soft_wrap=True, highlight=False)
        distributed.barrier()


def pace_of(run: Run) -> Pace:
    """Steps of the run, timed; the first is left out, in which readers start and kernels are chosen."""
    from applications.openvclip import distributed
    from applications.openvclip.training.planning import Pace

    step = run.trainer.step
    step.model.train()
    batches = run.micro_batches(0)
    times, waits = [], []
    for _ in range(1 + STEPS):
        began = time.perf_counter()
        values, _ = step(batches)  # its losses are read from the device, so that it has ended when this returns
        times.append(time.perf_counter() - began)
        waits.append(values["waited_s"])
    processes = distributed.world_size()
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return Pace(
        step_s=sum(times[1:]) / STEPS,
        waited_s=sum(waits[1:]) / STEPS,
        decoding_s=decoding_s(run),
        clips=len(run.order.own) * run.order.micro_batch,
        processes=processes,
        workers=run.config.data.workers,
        cores=max(1, len(os.sched_getaffinity(0)) // here),
    )


def decoding_s(run: Run) -> float:
    """CPU seconds of this process for one training clip, over the first few of the set that can be read."""
    from applications.openvclip.data.decode import VideoReadError

    used = []
    for i in range(len(run.clips.manifest)):
        began = time.process_time()
        try:
            run.clips((0, i, 0))
        except VideoReadError:
            continue
        used.append(time.process_time() - began)
        if len(used) == _CLIPS_TIMED:
            break
    return sum(used) / len(used)  # some can be read: steps have been taken


def report(run: Run, pace: Pace) -> Iterator[str]:
    """The lines that are printed."""
    from applications.openvclip import distributed
    from applications.openvclip.training.memory import memory_of
    from applications.openvclip.training.monitor import peak_memory_gb
    from applications.openvclip.training.planning import advice

    o, m, device = run.config.optimization, run.config.machine, distributed.device()
    on_gpu, step = device.type == "cuda", run.trainer.step
    trained = sum(p.numel() for p in step.encoder.parameters())
    yield f"parameters: {trained / 1e6:.1f} million trained, on {pace.processes} x {name_of(device)}"
    how = f"{m.precision}{', activation checkpointing' if m.activation_checkpointing else ''}"
    yield (
        f"a step: {o.batch_size} clips in micro-batches of {run.order.micro_batch}, {step.clips_at_once} at once; {how}"
    )
    shards = pace.processes if m.parallel == "fsdp2" else 1
    settings = {
        "frames": run.config.sampling.frames,
        "precision": m.precision,
        "replicated": pace.processes > 1 and m.parallel == "ddp",
    }
    counted = memory_of(run.evaluation.clip, activation_checkpointing=m.activation_checkpointing, **settings)
    measured = peak_memory_gb()
    room = 0.9 * memory_there(device)
    at = ", ".join(f"{b}: {counted.at(b, shards=shards) / 1e9:.2f}" for b in AT_ONCE)
    yield (
        f"memory counted, GB, by the clips at once: {at}; {room / 1e9:.0f} GB have room for "
        f"{counted.clips_within(room, shards=shards)}"
    )
    if measured is not None:
        what = "held by tensors" if on_gpu else "of the process, libraries included"
        yield f"measured at {step.clips_at_once}: {measured:.2f} GB {what}"
    yield (
        f"speed: {pace.clips * pace.processes / pace.step_s:.3g} clips/s, {pace.step_s:.3g} s a step, "
        f"{pace.waiting:.0%} of it waiting for clips"
    )
    yield (
        f"decoding: {1000 * pace.decoding_s:.0f} ms of CPU a clip; workers that keep up with the model: "
        f"{pace.workers_needed} (now {pace.workers}, cores {pace.cores})"
    )
    steps = run.order.last_step
    yield (
        f"the whole run: {o.epochs} epochs, {steps} steps, {pace.hours(steps):.3g} hours; costs "
        f"{pace.device_hours(steps):.3g} {'GPU' if on_gpu else 'process'} hours, evaluation not included"
    )
    without = counted if not m.activation_checkpointing else memory_of(run.evaluation.clip, **settings)
    for text in advice(
        pace,
        on_gpu=on_gpu,
        precision=m.precision,
        activation_checkpointing=m.activation_checkpointing,
        fits_without=without.clips_within(room, shards=shards) > 0,
    ):
        yield f"faster: {text}"


def name_of(device: torch.device) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def memory_there(device: torch.device) -> int:
    """Bytes of the GPU, or of the machine."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
