"""Batches for training, in an order that is a function of the seed and the step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import tee

import numpy as np
import torch
from torch import Tensor

from applications.openvclip.data.dataset import TrainingClips
from applications.openvclip.data.decode import VideoReadError
from applications.openvclip.data.workers import Workers

_ATTEMPTS = 10


@dataclass(frozen=True)
class TrainingOrder:
    """The samples of each step, as a batch sampler: every epoch is a new permutation; what fills no batch is left out.

    Args:
        n_samples: Number of videos.
        batch_size: Clips of a step.
        seed: Seed of the permutations.
        first_step: The step to start with; a resumed run goes on with the batches it would have had.
        last_step: Where to stop, exclusive.
    """

    n_samples: int
    batch_size: int
    seed: int
    first_step: int
    last_step: int

    def __post_init__(self) -> None:
        if not 0 < self.batch_size <= self.n_samples:
            raise ValueError(
                f"batch_size must be from 1 to the number of videos, {self.n_samples}, got {self.batch_size}."
            )

    @property
    def steps_per_epoch(self) -> int:
        return self.n_samples // self.batch_size

    def __len__(self) -> int:
        return self.last_step - self.first_step

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        drawn, order = -1, np.empty(0, np.int64)
        for step in range(self.first_step, self.last_step):
            epoch, position = divmod(step, self.steps_per_epoch)
            if epoch != drawn:
                drawn, order = epoch, np.random.default_rng([self.seed, epoch]).permutation(self.n_samples)
            batch = order[position * self.batch_size : (position + 1) * self.batch_size]
            yield [(epoch, int(i)) for i in batch]


def training_batches(
    clips: TrainingClips,
    order: TrainingOrder,
    *,
    workers: int,
    time_limit_s: float,
    on_fault: Callable[[str, str, str], object] = lambda fault, location, reason: None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of clips (B, 3, T, H, W) uint8 and labels (B,), one per step of `order`.

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
        batch: list[tuple[np.ndarray, int]] = []
        for (epoch, i, _), value in zip(asked, pool.map(keys, ahead=max(4 * workers, order.batch_size)), strict=True):
            attempt, location = 0, clips.manifest.location(i)
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
            batch.append((clip, label))
            if len(batch) == order.batch_size:
                yield (
                    torch.from_numpy(np.stack([clip for clip, _ in batch])),
                    torch.tensor([label for _, label in batch]),
                )
                batch = []
