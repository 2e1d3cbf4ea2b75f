"""The average of the weights as a teacher, whose answers are a part of what is learnt."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from interpolate import EMAAverager, SWAAverager


class Teacher:
    """Makes the target of the loss `weight * teacher + (1 - weight) * label`: the cross-entropy with it is that sum of
    the distillation term and the plain one.

    The teacher is the exponential moving average of the weights from the anchor on, or their mean, and answers with the
    probabilities that it gives the classes for the same clip, seen as the student sees it. It is no second module, and
    it goes with any regularizer: the target is the same at theta and at interpolated weights.

    Source: the teacher of TACO (arXiv 2606.25478), which begins at CLIP, with its decay. Departs from it in the
    target, which is logits instead of the structure of features, and in what surrounds it: the image tower alone is
    trained, with the attention to neighbouring frames and the mean over frames that all methods here have.

    Args:
        model: The model being fine-tuned, where the weights are still the anchor.
        weight: Weight of the teacher in the target, in [0, 1]; 0 leaves the labels.
        decay: Of the average, for each step; None for the mean of the anchor and the weights after every step.
    """

    def __init__(self, model: nn.Module, weight: float, decay: float | None) -> None:
        if not 0 <= weight <= 1:
            raise ValueError(f"weight is that of the teacher in the target and must be in [0, 1], got {weight}.")
        self.weight = weight
        self.average = (
            SWAAverager(model, start_at="anchor")
            if decay is None
            else EMAAverager(model, decay, warmup=False, start_at="anchor")
        )

    def target(self, labels: Tensor, logits: Callable[[nn.Module], Tensor]) -> Tensor:
        """Probabilities (B, K) to learn, of labels (B,).

        Args:
            labels: Which class each clip is of.
            logits: Computes the logits (B, K) of these clips with the model it is given. Where weights are sharded, all
                processes call this together.
        """
        answers = self.average.run(logits).softmax(dim=-1)
        return F.one_hot(labels, answers.shape[-1]).to(answers.dtype).lerp(answers, self.weight)

    def update(self) -> None:
        """Follow the student; after every step of the optimizer."""
        self.average.update()

    def state_dict(self) -> dict[str, Any]:
        return self.average.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.average.load_state_dict(state)
