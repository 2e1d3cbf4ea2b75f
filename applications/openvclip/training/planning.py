"""What a whole run takes, from a few of its steps, and what would make it faster."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Pace:
    """How fast steps were, on one of the processes."""

    step_s: float
    """Seconds of a step, waiting included."""
    waited_s: float
    """Of these, waiting for clips."""
    decoding_s: float
    """CPU seconds that one clip takes to be read, decoded and augmented."""
    clips: int
    """Clips of a step that are this process's."""
    processes: int
    """That share a step, with a GPU each if there are any."""
    workers: int
    """Processes that read videos, for each of those."""
    cores: int
    """CPU cores there are for each of those."""

    @property
    def waiting(self) -> float:
        """The share of a step that is spent on waiting for clips."""
        return self.waited_s / self.step_s

    @property
    def workers_needed(self) -> int:
        """How many would keep up with the model, each on a core of its own."""
        return math.ceil(self.decoding_s * self.clips / max(self.step_s - self.waited_s, 1e-9))

    def hours(self, steps: int) -> float:
        """Of so many steps."""
        return steps * self.step_s / 3600

    def device_hours(self, steps: int) -> float:
        """What so many steps cost: hours, times the processes."""
        return self.hours(steps) * self.processes


_WAITING = 0.05
"""A share of waiting that is worth something being done about it."""


def advice(
    pace: Pace, *, on_gpu: bool, precision: str, activation_checkpointing: bool, fits_without: bool
) -> list[str]:
    """What would make a run faster, the most first.

    Args:
        pace: What its steps were like.
        on_gpu: Whether the model is on one.
        precision: In which it computes.
        activation_checkpointing: Whether blocks are computed again in the backward pass.
        fits_without: Whether the memory of the device has room for one clip at a time without that.
    """
    found = []
    if pace.waiting > _WAITING:
        needed = pace.workers_needed
        if needed > pace.workers and pace.cores > pace.workers:
            found.append(f"more workers: --data.workers {min(needed, pace.cores)} (now {pace.workers})")
        if needed > pace.cores:
            found.append(
                f"cheaper clips: {needed} cores would be needed for each process and there are {pace.cores}. Store the "
                "videos once with a short side of 256 pixels and a key frame every second, or take machines with more "
                "cores"
            )
        if not found:
            found.append("faster storage, or a larger --data.cache-gb: there are workers enough, and they wait too")
    if activation_checkpointing and fits_without:
        found.append(
            "no activation checkpointing, which computes blocks twice: --no-activation-checkpointing with a smaller "
            "--clips-at-once"
        )
    if on_gpu and pace.waiting < 1 - _WAITING:
        if precision in ("fp32", "tf32"):
            found.append("--precision bf16")
        found.append("--compile, which takes minutes once, and more GPUs, up to one for each micro-batch")
    elif not on_gpu:
        found.append("a GPU: this was measured on the CPU")
    return found
