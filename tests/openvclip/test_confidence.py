"""Calibration and none of these: figures against those of another library, and on logits whose answer is known."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchmetrics.functional import calibration_error as reference_error
from torchmetrics.functional.classification import binary_auroc

from applications.openvclip.inference.calibration import calibration_of
from applications.openvclip.zeroshot.confidence import (
    accuracy_at_coverage,
    auroc,
    calibration_error,
    fitted_temperature,
    with_and_without,
)


def drawn(temperature: float, n: int = 4000, classes: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and labels that are drawn by their probabilities at a temperature."""
    generator = torch.Generator().manual_seed(0)
    logits = 6 * torch.randn(n, classes, generator=generator)
    return logits, torch.multinomial((logits / temperature).softmax(dim=1), 1, generator=generator).squeeze(1)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_the_temperature_is_the_one_that_labels_were_drawn_with(temperature: float) -> None:
    logits, labels = drawn(temperature)
    found = fitted_temperature(logits, labels)
    assert found == pytest.approx(temperature, rel=0.05)  # of 4000 labels
    loss = [torch.nn.functional.cross_entropy(logits.double() / (f * found), labels).item() for f in (0.99, 1, 1.01)]
    assert loss[1] == min(loss)


@pytest.mark.parametrize("wrong", [False, True])
def test_answers_that_fit_no_temperature_are_refused(wrong: bool) -> None:
    logits = torch.eye(3).repeat(10, 1)
    labels = torch.arange(3).repeat(10)
    with pytest.raises(ValueError, match=rf"30 videos with {'0.0' if wrong else '100.0'} % right answers fit no temp"):
        fitted_temperature(logits, (labels + 1) % 3 if wrong else labels)


@given(st.integers(0, 1000), st.integers(1, 60))
def test_the_calibration_error_is_that_of_torchmetrics(seed: int, n: int) -> None:
    generator = np.random.default_rng(seed)
    confidence, correct = generator.random(n), generator.random(n) < 0.5
    # theirs for two classes takes the probability of the second for the confidence, and that it is so for being right
    expected = reference_error(torch.tensor(confidence), torch.tensor(correct).long(), task="binary", n_bins=15)
    assert calibration_error(confidence, correct) == pytest.approx(expected.item(), abs=1e-5)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=30), st.lists(st.integers(0, 9), min_size=1, max_size=30))
def test_the_auroc_is_that_of_torchmetrics_ties_too(inside: list[int], outside: list[int]) -> None:
    scores = torch.tensor([*inside, *outside]) / 10.0  # exact enough: equal numbers stay equal
    expected = binary_auroc(scores, torch.tensor([1] * len(inside) + [0] * len(outside)))
    assert auroc(np.array(inside, float), np.array(outside, float)) == pytest.approx(expected.item(), abs=1e-6)


def test_coverage_keeps_the_surest() -> None:
    confidence, correct = np.linspace(0, 1, 100), np.arange(100) >= 5
    assert accuracy_at_coverage(confidence, correct) == 1.0
    assert accuracy_at_coverage(confidence, correct, coverage=1.0) == 0.95
    assert accuracy_at_coverage(np.array([0.3]), np.array([True])) == 1.0


def test_half_of_the_classes_hold_a_video_and_the_others_do_not() -> None:
    logits, labels = torch.randn(2, 40, 7, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 7
    logits[:, torch.arange(40), labels] = 9.0
    inside, outside = with_and_without(logits, labels)
    assert (inside == 9).all()
    assert (outside < 9).all()
    assert torch.equal(torch.maximum(inside, outside), logits.amax(dim=-1))
    two, other = with_and_without(logits[0, :, :2], labels.clamp(max=1))
    assert torch.equal(two, logits[0].gather(1, labels.clamp(max=1).unsqueeze(1)).squeeze(1))
    assert other.isfinite().all()


def test_calibration_lowers_the_error_of_answers_that_are_too_sure_and_keeps_95_percent_above_the_threshold() -> None:
    logits, labels = drawn(3.0)
    found = calibration_of(logits, labels, "drawn")
    assert found.temperature == pytest.approx(3, rel=0.05)
    assert found.ece_before > 0.1
    assert found.ece_after < 0.02
    assert (logits.amax(dim=1) > found.threshold).double().mean().item() == pytest.approx(0.95, abs=0.001)
    assert (found.videos, found.classes) == (4000, 5)
    with pytest.raises(ValueError, match="19 readable videos of 5 classes; at least 20"):
        calibration_of(logits[:19], labels[:19], "few")
