"""How weights are stepped: the learning rate, and AdamW."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn


@dataclass(frozen=True)
class LearningRate:
    """Linear warm-up from `lowest` to `highest`, then constant, or half a cosine back to `lowest`."""

    highest: float
    lowest: float
    warmup_steps: int
    total_steps: int
    schedule: Literal["constant", "cosine"]

    def __call__(self, step: int) -> float:
        if step < self.warmup_steps:
            return self.lowest + (self.highest - self.lowest) * (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return self.highest
        progress = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        return self.lowest + (self.highest - self.lowest) * 0.5 * (1 + math.cos(math.pi * progress))


def adamw(model: nn.Module, weight_decay: float, betas: tuple[float, float]) -> torch.optim.AdamW:
    """AdamW over the trainable weights, without decay for vectors and scalars."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    decayed, undecayed = [p for p in parameters if p.ndim >= 2], [p for p in parameters if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": undecayed, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=betas, fused=parameters[0].is_cuda)
