"""What a held-out set tells of how sure to be: a temperature, and a threshold below which it is none of the labels."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from applications.openvclip.runs.strict import structured
from applications.openvclip.runs.texts import json_object, write_text
from applications.openvclip.zeroshot.confidence import (
    accuracy_at_coverage,
    auroc,
    calibration_error,
    fitted_temperature,
    with_and_without,
)

NONE_OF_THESE = "none of these"
COVERAGE = 0.95
"""Share of the videos of the label set that are above the threshold."""


@dataclass(frozen=True)
class Calibration:
    """Of one anchor weight, with what the set said of it."""

    temperature: float
    """Logits are divided by it."""
    threshold: float
    """The logit of "none of these": it wins where no label is above it."""
    data: str
    videos: int
    classes: int
    accuracy: float
    ece_before: float
    """Expected calibration error of the plain probabilities."""
    ece_after: float
    """Of the calibrated ones, each half of the videos by the temperature of the other half."""
    auroc: float
    """Of telling videos whose class is among the labels from others, with half of the classes at a time."""
    accuracy_at_95: float
    """Of the 95 % of the videos with the most confident answers."""


def calibration_of(logits: Tensor, labels: Tensor, data: str) -> Calibration:
    """Fit temperature and threshold.

    Args:
        logits: (N, K), the mean of a video's views.
        labels: (N,).
        data: What the videos are, for the record.

    Raises:
        ValueError: There are too few videos or classes, or no temperature fits.
    """
    n, classes = logits.shape
    if n < 20 or classes < 2:
        raise ValueError(f"{data}: {n} readable videos of {classes} classes; at least 20 videos of 2 classes tell.")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    halves = order[: n // 2], order[n // 2 :]
    correct = logits.argmax(dim=1) == labels
    calibrated = torch.empty(n, dtype=torch.float64)
    for held_out, fitted_on in (halves, halves[::-1]):
        temperature = fitted_temperature(logits[fitted_on], labels[fitted_on])
        calibrated[held_out] = confidence(logits[held_out], temperature)
    inside, outside = with_and_without(logits, labels)
    plain = confidence(logits, 1.0)
    return Calibration(
        temperature=fitted_temperature(logits, labels),
        threshold=float(logits.double().amax(dim=1).quantile(1 - COVERAGE)),
        data=data,
        videos=n,
        classes=classes,
        accuracy=float(correct.double().mean()),
        ece_before=calibration_error(plain.numpy(), correct.numpy()),
        ece_after=calibration_error(calibrated.numpy(), correct.numpy()),
        auroc=auroc(inside.numpy(), outside.numpy()),
        accuracy_at_95=accuracy_at_coverage(plain.numpy(), correct.numpy()),
    )


def confidence(logits: Tensor, temperature: float) -> Tensor:
    """The probability of the best label: (N, K) → (N,)."""
    return (logits.double() / temperature).softmax(dim=1).amax(dim=1)


def read_calibrations(path: Path) -> dict[str, Calibration]:
    """Those of a run by anchor weight; none where there is no file.

    Raises:
        ValueError: The file is something else.
    """
    if not path.exists():
        return {}
    found: dict[str, Any] = json_object(path.read_text(encoding="utf-8"), path)
    return {weight: structured(values, Calibration, f"{path}, {weight}") for weight, values in found.items()}


def write_calibration(path: Path, anchor_weight: float, calibration: Calibration) -> None:
    """Put it beside those of other anchor weights."""
    found = {weight: asdict(other) for weight, other in read_calibrations(path).items()}
    found[f"{anchor_weight:g}"] = asdict(calibration)
    write_text(path, json.dumps(found, indent=1) + "\n")
