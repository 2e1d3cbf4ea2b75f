"""Batches in an order that is a function of the seed and the step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch.utils.data import DataLoader

from applications.openvclip.data.dataset import EvaluationViews, TrainingClips


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
        for step in range(self.first_step, self.last_step):
            epoch, position = divmod(step, self.steps_per_epoch)
            order = np.random.default_rng([self.seed, epoch]).permutation(self.n_samples)
            batch = order[position * self.batch_size : (position + 1) * self.batch_size]
            yield [(epoch, int(i)) for i in batch]


def training_loader(clips: TrainingClips, order: TrainingOrder, workers: int) -> DataLoader:
    """Batches of clips (B, 3, T, H, W) and labels (B,), one per step of `order`."""
    return DataLoader(clips, batch_sampler=order, num_workers=workers, prefetch_factor=4 if workers else None)


def evaluation_loader(views: EvaluationViews, batch_size: int, workers: int) -> DataLoader:
    """Batches of views (B, V, 3, T, H, W) and labels (B,), every video once, in the order of the manifest."""
    return DataLoader(views, batch_size=batch_size, num_workers=workers)
