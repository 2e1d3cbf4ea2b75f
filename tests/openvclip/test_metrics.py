import pytest
import torch

from applications.openvclip.zeroshot.metrics import top_k_accuracy


def test_accuracy_counts_labels_among_the_highest_logits() -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0], [1.0, 3.0, 2.0], [2.0, 1.0, 3.0]])
    labels = torch.tensor([0, 2, 1])
    assert top_k_accuracy(logits, labels) == pytest.approx(1 / 3)
    assert top_k_accuracy(logits, labels, k=2) == pytest.approx(2 / 3)
    assert top_k_accuracy(logits, labels, k=3) == 1.0
