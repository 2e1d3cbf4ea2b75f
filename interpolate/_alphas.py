"""Which alpha belongs to a step and to a rank or micro-batch, and when a step ends."""

from __future__ import annotations

import random
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from interpolate.weights import whole


class AlphaSequence:
    """Alphas drawn from U(0, max_alpha), each a function of (seed, step, index) alone, the index being the rank.

    Args:
        max_alpha: Upper end of their range.
        seed: Of the sequence; the same on every rank.
        shared: Whether all ranks have the alphas of index 0.
    """

    def __init__(self, max_alpha: float, seed: int, *, shared: bool) -> None:
        self.max_alpha = max_alpha
        self.seed = whole("seed", seed)
        self.step = 0
        """How many steps have ended."""
        self._shared = shared
        self._seed_agreed: int | None = None
        self._held = False
        self._in_optimizer = False
        self._drawn_in_optimizer = False
        _follow_optimizers(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy follows the optimizers as the original does."""
        self.__dict__.update(state)
        _follow_optimizers(self)

    @property
    def alpha(self) -> float:
        """The weight of the anchor in this step, in [0, max_alpha): a function of (seed, step, rank) alone."""
        return self.alpha_of()

    def alpha_of(self, index: int | None = None) -> float:
        """The weight of the anchor in this step for the micro-batch of an index, by default the rank."""
        return self.max_alpha * self._generator(index).random()

    @contextmanager
    def one_step(self) -> Iterator[None]:
        """Let all calls in a `with` block belong to one step, which ends with it: one alpha for each index.

        Calls outside are a step each, except those from the closure of an optimizer (LBFGS evaluates it several
        times), which share one without being told. A block that is left by an exception ends no step.

        Example:
            >>> import torch
            >>> from interpolate import InterpolatedWeightRegularizer
            >>> model = torch.nn.Linear(2, 1)
            >>> regularizer = InterpolatedWeightRegularizer(model)
            >>> with regularizer.one_step():  # two micro-batches, each with an alpha of its own
            ...     for index, x in enumerate(torch.ones(2, 4, 2)):
            ...         loss = regularizer.backward(lambda model: model(x).mean() / 2, index=index)
            >>> regularizer.step
            1
        """
        if self._held:
            raise RuntimeError("one_step() within one_step(): a step can't be part of another.")
        self._held = True
        try:
            yield
        finally:
            self._held = False
        self.step += 1

    def _generator(self, index: int | None) -> random.Random:
        if index is None:
            index = dist.get_rank() if not self._shared and _distributed() else 0
        elif index < 0:
            raise ValueError(f"index is that of a micro-batch, counted from 0, got {index}.")
        return random.Random(f"interpolate/{self.seed}/{self.step}" + (f"/{index}" if index else ""))

    def _end_call(self) -> None:
        """One use of an alpha is over, and the step with it, unless the step is that of a block or of an optimizer."""
        if self._in_optimizer:
            self._drawn_in_optimizer = True
        elif not self._held:
            self.step += 1

    def _agree_on_seed(self) -> None:
        """Raise `ValueError` unless ranks that share alpha have one seed; asked once, when all of them are there."""
        if not self._shared or not _distributed() or self._seed_agreed == self.seed:
            return
        seeds: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(seeds, self.seed)
        if len(set(seeds)) > 1:
            raise ValueError(f"seed must be the same on every rank where they share alpha, got {seeds}.")
        self._seed_agreed = self.seed

    def _optimizer_begins(self) -> None:
        self._optimizer_ends()  # of one whose closure raised an error
        self._in_optimizer = True

    def _optimizer_ends(self) -> None:
        if self._drawn_in_optimizer and not self._held:
            self.step += 1
        self._in_optimizer = self._drawn_in_optimizer = False


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _follow_optimizers(sequence: AlphaSequence) -> None:
    """Tell a sequence when any optimizer of torch begins and ends a step, for as long as the sequence lives."""
    alive = weakref.ref(sequence)

    def begins(*_: Any) -> None:
        if (found := alive()) is not None:
            found._optimizer_begins()

    def ends(*_: Any) -> None:
        if (found := alive()) is not None:
            found._optimizer_ends()

    for handle in (register_optimizer_step_pre_hook(begins), register_optimizer_step_post_hook(ends)):
        weakref.finalize(sequence, handle.remove)
