"""What the study trains, and which rows of its tables come out of each run. All of it is data."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from applications.openvclip.zeroshot.results import LAST

Size = Literal["quick", "default", "full"]
SIZES: tuple[Size, ...] = ("quick", "default", "full")

SETS = ("closed", "zs_object", "zs_motion", "zs_colour", "images", "out_of_context")
ZERO_SHOT = ("zs_object", "zs_motion", "zs_colour")
"""Whose mean is the zero-shot accuracy."""
PATCH = 0.5
SEEDS: dict[Size, tuple[int, ...]] = {
    "quick": (10, 11),
    "default": (10, 11, 12, 13, 14),
    "full": (10, 11, 12, 13, 14),
}


@dataclass(frozen=True)
class Training:
    """One run of training for every seed: the miniature's recipe with these options."""

    name: str
    options: tuple[str, ...]
    size: Size
    """The smallest of the study that it is a part of; larger ones hold it too."""
    videos_per_class: int | None = None
    """How many of the 48 are trained on; by default all."""


@dataclass(frozen=True)
class Row:
    """One line of a table: a run's averaged or last weights, patched or not. Its curve has all anchor weights."""

    name: str
    training: str
    averaged: bool
    anchor_weight: float

    @property
    def scorer(self) -> str:
        """Its name in the results of a run."""
        return scorer(self.averaged, self.anchor_weight)


def scorer(averaged: bool, anchor_weight: float) -> str:
    return f"{'' if averaged else LAST}{anchor_weight:g}"


def _with(method: str, *options: str) -> tuple[str, ...]:
    return ("--method", method, *options)


# swa trains as fine-tuning does, and open-vclip as iwr: the last weights of either are the method without averaging
_METHODS = (
    Training("plain", _with("swa"), "quick"),
    Training("iwr", _with("open-vclip"), "quick"),
    Training("l2", _with("l2"), "default"),
    Training("teacher", _with("teacher"), "default"),
    Training("iwr+teacher", _with("open-vclip+teacher"), "default"),
    Training("mean teacher", _with("teacher", "--teacher.decay", "None"), "default"),
    Training("iwr every other step", _with("open-vclip", "--regularizer.every", "2"), "default"),
    Training("iwr split", _with("open-vclip", "--regularizer.passes", "split"), "default"),
    Training("iwr random", _with("open-vclip", "--regularizer.passes", "random"), "default"),
    Training("iwr alpha per micro-batch", _with("open-vclip", "--optimization.micro-batch", "8"), "default"),
    Training("iwr edge zero", _with("open-vclip", "--model.edge", "zero"), "default"),
)


@dataclass(frozen=True)
class Variation:
    """Trainings once more, each with something else than the recipe has."""

    name: str
    options: tuple[str, ...]
    of: tuple[str, ...]
    """The trainings that are varied."""
    videos_per_class: int | None = None
    instead_of: str | None = None
    """The recipe's own value of a setting, with which this one is compared; None for other conditions, under which
    methods are compared with each other alone."""

    def named(self, name: str) -> str:
        """What a training, a row or a claim is called when it is varied."""
        return f"{name}, {self.name}"


_CHIEF = ("plain", "iwr", "l2", "mean teacher")  # the paper's rows, and the best of what else there is
_FEW = ("--optimization.epochs", "6", "--averager.start-epoch", "3")  # over-fitting limits them, not the steps
VARIATIONS = (
    Variation("cosine", ("--optimization.schedule", "cosine"), _CHIEF),
    Variation("16 videos", _FEW, _CHIEF, videos_per_class=16),
    Variation("max-alpha 0.3", ("--regularizer.max-alpha", "0.3"), ("iwr",), instead_of="0.6"),
    Variation("max-alpha 0.9", ("--regularizer.max-alpha", "0.9"), ("iwr",), instead_of="0.6"),
    Variation("strength 0.25", ("--regularizer.strength", "0.25"), ("iwr",), instead_of="0.5"),
    Variation("strength 1", ("--regularizer.strength", "1"), ("iwr",), instead_of="0.5"),
    Variation("learning rate 5e-4", ("--optimization.learning-rate", "5e-4"), ("plain", "iwr"), instead_of="1e-3"),
    Variation("learning rate 2e-3", ("--optimization.learning-rate", "2e-3"), ("plain", "iwr"), instead_of="1e-3"),
)
_FULL = tuple(
    Training(v.named(t.name), (*t.options, *v.options), "full", v.videos_per_class)
    for v in VARIATIONS
    for t in _METHODS
    if t.name in v.of
)
TRAININGS = (*_METHODS, *_FULL)


@dataclass(frozen=True)
class Mixture:
    """Weights that are not trained but made of the averages that several trainings with one seed have left."""

    name: str
    trainings: tuple[str, ...]
    """Whose mean it is."""
    shallow: float = 0.0
    """Weight of the anchor in the first block of the tower, falling to 0 in the last."""
    size: Size = "default"


MIXTURES = (
    Mixture("plain and iwr", ("plain", "iwr")),
    Mixture("iwr and teacher", ("iwr", "teacher")),
    Mixture("iwr by depth", ("iwr",), shallow=0.5),
)


def _rows(training: str, last: str | None, averaged: str) -> tuple[Row, ...]:
    of_last = (Row(last, training, False, 0.0), Row(f"{last} + patch", training, False, PATCH)) if last else ()
    return (*of_last, Row(averaged, training, True, 0.0), Row(f"{averaged} + patch", training, True, PATCH))


_OF_THE_RECIPE = (
    *_rows("plain", "fine-tuning", "SWA"),
    *_rows("iwr", "IWR", "IWR + SWA"),
    *_rows("l2", "l2", "l2 + SWA"),
    *_rows("teacher", None, "EMA teacher + SWA"),
    *_rows("iwr+teacher", None, "IWR + EMA teacher + SWA"),
    *_rows("mean teacher", None, "mean teacher + SWA"),
    *_rows("iwr every other step", None, "IWR, every other step + SWA"),
    *_rows("iwr split", None, "IWR, split + SWA"),
    *_rows("iwr random", None, "IWR, random + SWA"),
    *_rows("iwr alpha per micro-batch", None, "IWR, alpha per micro-batch + SWA"),
    *_rows("iwr edge zero", None, "IWR, edge zero + SWA"),
    *_rows("plain and iwr", None, "mean of SWA and IWR + SWA"),
    *_rows("iwr and teacher", None, "mean of IWR + SWA and EMA teacher + SWA"),
    *_rows("iwr by depth", None, "IWR + SWA, by depth"),
)
ROWS = (
    *_OF_THE_RECIPE,
    *(
        replace(row, name=v.named(row.name), training=v.named(row.training))
        for v in VARIATIONS
        for row in _OF_THE_RECIPE
        if row.training in v.of
    ),
)


@dataclass(frozen=True)
class Claim:
    """That one row's curve lies above another's: more zero-shot accuracy at equal closed accuracy."""

    text: str
    better: str
    worse: str


CLAIMS = (
    Claim("IWR lifts the curve of fine-tuning", "IWR + patch", "fine-tuning + patch"),
    Claim("SWA lifts the curve of fine-tuning", "SWA + patch", "fine-tuning + patch"),
    Claim("Open-VCLIP lies above fine-tuning", "IWR + SWA + patch", "fine-tuning + patch"),
    Claim("IWR adds to SWA", "IWR + SWA + patch", "SWA + patch"),
    Claim("IWR is better than the l2 penalty", "IWR + SWA + patch", "l2 + SWA + patch"),
    Claim("A teacher is better than IWR", "EMA teacher + SWA + patch", "IWR + SWA + patch"),
    Claim("IWR adds to a teacher", "IWR + EMA teacher + SWA + patch", "EMA teacher + SWA + patch"),
    Claim("The mean is a better teacher than the EMA", "mean teacher + SWA + patch", "EMA teacher + SWA + patch"),
    Claim("The mean as a teacher is better than IWR", "mean teacher + SWA + patch", "IWR + SWA + patch"),
    Claim("Every step is better than every other", "IWR + SWA + patch", "IWR, every other step + SWA + patch"),
    Claim(
        "A mean of SWA and IWR + SWA lies above the latter", "mean of SWA and IWR + SWA + patch", "IWR + SWA + patch"
    ),
    Claim(
        "A mean of IWR + SWA and a teacher lies above the former",
        "mean of IWR + SWA and EMA teacher + SWA + patch",
        "IWR + SWA + patch",
    ),
    Claim("More of the anchor in shallow blocks lifts", "IWR + SWA, by depth + patch", "IWR + SWA + patch"),
    Claim("Two passes are better than half a batch each", "IWR + SWA + patch", "IWR, split + SWA + patch"),
    Claim("Two passes are better than one at random", "IWR + SWA + patch", "IWR, random + SWA + patch"),
    Claim("An alpha for each micro-batch is better", "IWR, alpha per micro-batch + SWA + patch", "IWR + SWA + patch"),
    Claim("Masked edges are better than zeros", "IWR + SWA + patch", "IWR, edge zero + SWA + patch"),
)


def claims_of(variation: Variation) -> tuple[Claim, ...]:
    """The claims about methods that are varied, and of a setting that it is better than the recipe's."""
    training = {row.name: row.training for row in _OF_THE_RECIPE}
    of_methods = (
        Claim(*map(variation.named, (claim.text, claim.better, claim.worse)))
        for claim in CLAIMS
        if {training[claim.better], training[claim.worse]} <= {*variation.of}
    )
    if variation.instead_of is None:
        return tuple(of_methods)
    row = "IWR + SWA + patch"
    return (Claim(f"{variation.name} is better than {variation.instead_of}", variation.named(row), row), *of_methods)


def trainings_of(size: Size) -> tuple[Training, ...]:
    return tuple(t for t in TRAININGS if SIZES.index(t.size) <= SIZES.index(size))


def mixtures_of(size: Size) -> tuple[Mixture, ...]:
    return tuple(m for m in MIXTURES if SIZES.index(m.size) <= SIZES.index(size))
