"""Micro-batches for training, in an order that is a function of the seed and the step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice, tee
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from applications.openvclip.data.decode import VideoReadError
from applications.openvclip.data.training_clips import TrainingClips
from applications.openvclip.data.workers import Workers

_ATTEMPTS = 10


class MicroBatch(NamedTuple):
    """The clips that are looked at together, one of several micro-batches of a step."""

    clips: Tensor
    """(b, 3, T, H, W)."""
    labels: Tensor
    """(b,) int64: the indices of their classes."""
    videos: tuple[str, ...]
    """Where they come from."""


@dataclass(frozen=True)
class TrainingOrder:
    """Which videos a step takes, and which of them this process: every epoch is a new permutation.

    A step takes the next `batch_size` videos of the epoch's permutation, as micro-batches of `micro_batch` videos, one
    after another; what fills no batch is left out of the epoch. Process r of n takes the micro-batches r, r + n, …, so
    that the videos of a micro-batch do not depend on how many processes there are.

    Args:
        n_samples: Number of videos.
        batch_size: Clips of a step, over all processes.
        micro_batch: Clips of a micro-batch; divides the batch.
        seed: Seed of the permutations.
        first_step: The step to start with; a resumed run goes on with the batches it would have had.
        last_step: Where to stop, exclusive.
        rank: Which process this is.
        world_size: Number of processes, at most one for each micro-batch.

    Raises:
        ValueError: A batch is larger than the set, or is not whole micro-batches; or a process would get none.
    """

    n_samples: int
    batch_size: int
    micro_batch: int
    seed: int
    first_step: int
    last_step: int
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.batch_size <= self.n_samples:
            raise ValueError(
                f"batch_size must be from 1 to the number of videos, {self.n_samples}, got {self.batch_size}."
            )
        if self.micro_batch < 1 or self.batch_size % self.micro_batch:
            raise ValueError(
                f"micro_batch must divide the batch of {self.batch_size} clips evenly, got {self.micro_batch}."
            )
        if self.world_size > self.micro_batches:
            raise ValueError(
                f"{self.world_size} processes for {self.micro_batches} micro-batches of {self.micro_batch} clips: some "
                "would have nothing to do. Start fewer processes, or make the micro-batches smaller "
                "(--optimization.micro-batch)."
            )

    @property
    def steps_per_epoch(self) -> int:
        return self.n_samples // self.batch_size

    @property
    def micro_batches(self) -> int:
        """How many a step has, over all processes."""
        return self.batch_size // self.micro_batch

    @property
    def own(self) -> range:
        """Which of a step's micro-batches are this process's."""
        return range(self.rank, self.micro_batches, self.world_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        """(epoch, index of the video) of the clips of each micro-batch of this process."""
        drawn, order = -1, np.empty(0, np.int64)
        for step in range(self.first_step, self.last_step):
            epoch, position = divmod(step, self.steps_per_epoch)
            if epoch != drawn:
                drawn, order = epoch, np.random.default_rng([self.seed, epoch]).permutation(self.n_samples)
            for m in self.own:
                first = position * self.batch_size + m * self.micro_batch
                yield [(epoch, int(i)) for i in order[first : first + self.micro_batch]]


def micro_batches(
    clips: TrainingClips,
    order: TrainingOrder,
    *,
    workers: int,
    time_limit_s: float,
    on_fault: Callable[[str, str, str], object] = lambda fault, location, reason: None,
) -> Iterator[MicroBatch]:
    """The micro-batches of this process, clips as uint8, `len(order.own)` per step.

    A video that can't be read is replaced by another one, which depends on the seed, the epoch and its index alone; one
    that was cut off is used as far as it goes.

    Args:
        clips: What to read.
        order: Which clips, when.
        workers: Processes that read videos.
        time_limit_s: Seconds that reading one clip may take.
        on_fault: Told "unreadable" or "cut-off", the location of the video, and the reason, each time it is met.

    Raises:
        VideoReadError: None of 10 videos that were to take one place could be read.
    """
    keys, asked = tee((epoch, i, 0) for batch in order for epoch, i in batch)  # not a list: a run has millions
    with Workers(clips, workers, time_limit_s) as pool:
        of_a_step = len(order.own) * order.micro_batch
        values = zip(asked, pool.map(keys, ahead=max(4 * workers, of_a_step)), strict=True)
        while read := list(islice(values, order.micro_batch)):
            found = [_readable(clips, pool, key, value, on_fault) for key, value in read]
            yield MicroBatch(
                torch.from_numpy(np.stack([clip for clip, _, _ in found])),
                torch.tensor([label for _, label, _ in found]),
                tuple(location for _, _, location in found),
            )


def _readable(
    clips: TrainingClips,
    pool: Workers[tuple[int, int, int], tuple[np.ndarray, int, str]],
    key: tuple[int, int, int],
    value: tuple[np.ndarray, int, str] | VideoReadError,
    on_fault: Callable[[str, str, str], object],
) -> tuple[np.ndarray, int, str]:
    """The clip of a place in the batch, its label and where it comes from: of its own video, or of one in its stead."""
    (epoch, i, attempt), location = key, clips.manifest.location(key[1])
    while isinstance(value, VideoReadError):
        on_fault("unreadable", location, str(value))
        attempt += 1
        if attempt == _ATTEMPTS:
            raise VideoReadError(f"none of {_ATTEMPTS} videos in a row can be read; the last: {value}")
        location = clips.manifest.location(clips.video((epoch, i, attempt)))
        value = pool.ask((epoch, i, attempt))
    clip, label, shortfall = value
    if shortfall:
        on_fault("cut-off", location, shortfall)
    return clip, label, location
