"""In which ranges settings must be, by their flags; what depends on the videos is checked where they are known."""

from __future__ import annotations

from collections.abc import Iterable
from math import inf

from applications.openvclip.config import Config

Range = tuple[str, float, str, bool]
"""A flag, its value, what it must be, and whether it is."""


def check(ranges: Iterable[Range]) -> None:
    """Refuse the first setting that is out of its range.

    Raises:
        ValueError: There is one; the message has its flag, its value and its range.
    """
    for flag, value, expected, holds in ranges:
        if not holds:
            raise ValueError(f"--{flag.replace('_', '-')}: must be {expected}, got {value:g}.")


def training_ranges(config: Config) -> Iterable[Range]:
    """Those of what only training needs."""
    o, a, r, v = config.optimization, config.averager, config.regularizer, config.augmentation
    yield "seed", config.seed, "at least 0", config.seed >= 0
    yield "optimization.epochs", o.epochs, "at least 1", o.epochs >= 1
    yield "optimization.batch_size", o.batch_size, "at least 1", o.batch_size >= 1
    micro_batch = o.batch_size if o.micro_batch is None else o.micro_batch
    divides = micro_batch >= 1 and o.batch_size % micro_batch == 0
    yield "optimization.micro_batch", micro_batch, f"a divisor of the batch of {o.batch_size} clips", divides
    yield "optimization.learning_rate", o.learning_rate, "positive and finite", 0 < o.learning_rate < inf
    lowest = o.lowest_learning_rate
    yield "optimization.lowest_learning_rate", lowest, "from 0 to the learning rate", 0 <= lowest <= o.learning_rate
    yield "optimization.warmup_epochs", o.warmup_epochs, "finite and not negative", 0 <= o.warmup_epochs < inf
    yield "optimization.weight_decay", o.weight_decay, "finite and not negative", 0 <= o.weight_decay < inf
    for beta in o.betas:
        yield "optimization.betas", beta, "in [0, 1)", 0 <= beta < 1
    yield "optimization.max_gradient_norm", o.max_gradient_norm, "positive", o.max_gradient_norm > 0
    yield "regularizer.max_alpha", r.max_alpha, "in [0, 1)", 0 <= r.max_alpha < 1
    yield "regularizer.strength", r.strength, "finite and not negative", 0 <= r.strength < inf
    yield "regularizer.every", r.every, "at least 1", r.every >= 1
    yield "averager.start_epoch", a.start_epoch, "finite and not negative", 0 <= a.start_epoch < inf
    yield "averager.snapshots_per_epoch", a.snapshots_per_epoch, "at least 1", a.snapshots_per_epoch >= 1
    t = config.teacher
    yield "teacher.weight", t.weight, "in [0, 1]", 0 <= t.weight <= 1
    yield "teacher.decay", t.decay or 0, "in [0, 1)", t.decay is None or 0 <= t.decay < 1
    c, m = config.checkpoint, config.machine
    yield "checkpoint.every_steps", c.every_steps or 0, "at least 1", c.every_steps is None or c.every_steps >= 1
    yield "checkpoint.every_minutes", c.every_minutes, "positive", c.every_minutes > 0
    yield "checkpoint.keep", c.keep, "at least 1", c.keep >= 1
    yield "clips_at_once", m.clips_at_once or 0, "at least 1", m.clips_at_once is None or m.clips_at_once >= 1
    every_epochs = config.in_training.every_epochs
    yield "in_training.every_epochs", every_epochs, "0 or more", every_epochs >= 0
    yield "hang_limit_s", m.hang_limit_s, "positive", m.hang_limit_s > 0
    yield "augmentation.max_short_side", v.max_short_side, "finite and at least 1", 1 <= v.max_short_side < inf
    yield "augmentation.colour_jitter", v.colour_jitter, "in [0, 1]", 0 <= v.colour_jitter <= 1


def evaluation_ranges(config: Config, evaluation: str = "", data: str = "") -> Iterable[Range]:
    """Those of what every evaluation needs; its flags begin with `evaluation` and `data`, or with nothing."""
    e, d = config.evaluation, config.data
    yield f"{evaluation}anchor_weight", e.anchor_weight, "in [0, 1]", 0 <= e.anchor_weight <= 1
    for weight in e.anchor_weights:
        yield f"{evaluation}anchor_weights", weight, "in [0, 1]", 0 <= weight <= 1
    yield f"{evaluation}batch_size", e.batch_size, "at least 1", e.batch_size >= 1
    yield f"{data}workers", d.workers, "at least 1", d.workers >= 1
    yield f"{data}time_limit_s", d.time_limit_s, "positive", d.time_limit_s > 0
    yield f"{data}cache_gb", d.cache_gb, "positive and finite", 0 < d.cache_gb < inf
