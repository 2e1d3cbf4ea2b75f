"""What an evaluation found, and the file that holds it. Reading it needs nothing heavy."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import cattrs

from applications.openvclip.runs.texts import write_text

BASELINE = "CLIP*"
LAST = "last "
"""Before an anchor weight: of the last weights of training in place of their average."""


@dataclass(frozen=True)
class ProtocolResult:
    """Accuracies under one protocol, in [0, 1], of CLIP* and of each anchor weight.

    "0.5" is the average of the fine-tuned weights, patched so, "0" the average itself, and "last 0.5" what training
    ended with, patched so.
    """

    protocol: str
    hash: str
    closed: bool
    """Whether its classes are those of training."""
    videos: int
    """Different ones, over all parts."""
    classes: int
    """Different ones, over all parts."""
    parts: list[str]
    top_k: list[int]
    templates: list[str]
    sampling: dict[str, Any]
    unreadable_policy: str
    unreadable: dict[str, str]
    """Why videos could not be read, by location."""
    accuracy: dict[str, dict[str, list[float]]]
    """By scorer, then by metric (`metrics`): of each part."""
    per_class: dict[str, dict[str, float]]
    """By scorer, then by class: top-1 over the videos of the class in all parts; or the mean of its average precision
    in them."""
    confidence: dict[str, dict[str, list[float]]] = field(default_factory=dict)  # older files have none
    """By scorer, of each part, over the videos that could be read: `ece`, the expected calibration error;
    `ece_calibrated`, that of probabilities at the run's temperature, where there is one; `accuracy_at_95`, of the 95 %
    with the surest answers; `auroc`, of telling videos whose class is among the labels from others, with a half of the
    classes at a time."""
    cut_off: dict[str, str] = field(default_factory=dict)  # older files do not tell
    """What is missing of videos that were cut off, by location; they were scored as far as they go."""

    multi_label: bool = False  # older files have none of it
    """Whether a video may show several classes."""

    @property
    def metrics(self) -> list[str]:
        """What was measured: "top-1" and the like, or "mAP", the mean average precision over classes."""
        return ["mAP"] if self.multi_label else [f"top-{k}" for k in self.top_k]

    def mean_std(self, scorer: str, metric: str | None = None) -> tuple[float, float]:
        """Mean and standard deviation over the parts; of the first metric, where none is named."""
        return mean_std(self.accuracy[scorer][metric or self.metrics[0]])

    def text(self, scorer: str, metric: str | None = None) -> str:
        """In percent, as the paper prints it: "87.1±2.4", or "79.5" where there is one part."""
        return percent(*self.mean_std(scorer, metric), parts=len(self.parts))


def mean_std(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation of the values themselves (numpy's default, not the estimate for a population)."""
    return fmean(values), pstdev(values)


def percent(mean: float, std: float, *, parts: int) -> str:
    return f"{100 * mean:.1f}±{100 * std:.1f}" if parts > 1 else f"{100 * mean:.1f}"


@dataclass(frozen=True)
class Results:
    """The results of one evaluation, as they are in `results.json`."""

    model: str
    """Name of the image model."""
    anchor_weight: float
    """Of the final model."""
    protocols: dict[str, ProtocolResult]
    provenance: dict[str, Any]
    config: dict[str, Any]


def write_results(path: Path, results: Results) -> None:
    write_text(path, json.dumps({"metric": "accuracy", **asdict(results)}, indent=2) + "\n")


def read_results(path: Path) -> Results:
    """What `write_results` wrote.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is something else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; an evaluation that has ended leaves one in its folder.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        content.pop("metric")
        return cattrs.Converter(forbid_extra_keys=True, detailed_validation=False).structure(content, Results)
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        cattrs.BaseValidationError,
        cattrs.ForbiddenExtraKeysError,
    ) as error:
        raise ValueError(f"{path} is not the results of an evaluation, as `openvclip evaluate` writes them.") from error
