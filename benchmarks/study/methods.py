"""What the study trains, and which rows of its tables come out of each run. All of it is data."""

from __future__ import annotations

from dataclasses import dataclass
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
_COSINE = ("--optimization.schedule", "cosine")
_FEW = ("--optimization.epochs", "6", "--averager.start-epoch", "3")  # over-fitting limits them, not the steps
_FULL = (
    *(Training(f"{t.name}, cosine", (*t.options, *_COSINE), "full") for t in _METHODS),
    *(Training(f"{t.name}, 16 videos", (*t.options, *_FEW), "full", videos_per_class=16) for t in _METHODS),
    *(
        Training(f"iwr, {name} {value}", _with("open-vclip", f"--regularizer.{name}", value), "full")
        for name, values in (("max-alpha", ("0.3", "0.9")), ("strength", ("0.25", "1")))
        for value in values
    ),
    *(
        Training(f"{name}, learning rate {rate}", _with(method, "--optimization.learning-rate", rate), "full")
        for name, method in (("plain", "swa"), ("iwr", "open-vclip"))
        for rate in ("5e-4", "2e-3")
    ),
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


ROWS = (
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
    *(row for t in _FULL for row in _rows(t.name, None, f"{t.name} + SWA")),
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


def trainings_of(size: Size) -> tuple[Training, ...]:
    return tuple(t for t in TRAININGS if SIZES.index(t.size) <= SIZES.index(size))


def mixtures_of(size: Size) -> tuple[Mixture, ...]:
    return tuple(m for m in MIXTURES if SIZES.index(m.size) <= SIZES.index(size))
