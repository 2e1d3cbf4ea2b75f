"""Fine-tuning: the loop, its step, and the state to resume it from."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from applications.openvclip.progress import progress_bar
from applications.openvclip.runs.journal import Journal
from applications.openvclip.training.l2_penalty import L2Penalty
from applications.openvclip.training.optimisation import LearningRate
from applications.openvclip.training.state import load_state, save_state
from interpolate import InterpolatedWeightRegularizer, SWAAverager


@dataclass
class Trainer:
    """Fine-tunes a video encoder on a closed label set, with interpolated weight optimization."""

    model: nn.Module
    class_embeddings: Tensor
    """(K, E): the closed label set."""
    optimizer: torch.optim.Optimizer
    learning_rate: LearningRate
    regularizer: InterpolatedWeightRegularizer | L2Penalty
    averager: SWAAverager
    max_gradient_norm: float
    journal: Journal
    videos: str
    """What is trained on, as a hash."""
    step: int = 0
    """Steps taken."""

    def fit(self, batches: Iterable[tuple[Tensor, Tensor]], *, steps_per_epoch: int, checkpoint: Path) -> None:
        """Take a step for each batch that is left; write the checkpoint at the end of every epoch.

        Args:
            batches: Clips (B, 3, T, H, W) and labels (B,), beginning with those of step `self.step`.
            steps_per_epoch: How often to write the checkpoint.
            checkpoint: Where.

        Raises:
            FloatingPointError: A loss or gradient is not finite. The weights have not been changed by it, and the
                checkpoint of the last epoch is intact.
        """
        device = self.class_embeddings.device
        self.model.train()
        with progress_bar(unit="clips") as progress:
            task = progress.add_task("fine-tuning", total=None)
            for clips, labels in batches:
                values = self.train_step(clips.to(device), labels.to(device))
                self.journal.write("step", step=self.step, **values)
                done, total = (steps * len(clips) for steps in (self.step, self.learning_rate.total_steps))
                text = f"fine-tuning, loss {values['loss']:.3f}"
                progress.update(task, completed=done, total=total, description=text)
                if self.step % steps_per_epoch == 0:
                    save_state(checkpoint, self.state_dict())
                    epoch = self.step // steps_per_epoch
                    self.journal.write("checkpoint", step=self.step, epoch=epoch)
                    progress.console.print(f"epoch {epoch}: loss {values['loss']:.3f}")

    def train_step(self, clips: Tensor, labels: Tensor) -> dict[str, float]:
        """One step: both gradients, clipped; stop if they are not finite; update; average on schedule."""
        learning_rate = self.learning_rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        alpha = self.regularizer.alpha
        self.optimizer.zero_grad()
        loss = self.regularizer.backward(lambda model: F.cross_entropy(model(clips, self.class_embeddings), labels))
        interpolated_loss = self.regularizer.interpolated_loss
        gradient_norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.max_gradient_norm)
        values = {
            "loss": loss.item(),
            **({} if interpolated_loss is None else {"interpolated_loss": interpolated_loss.item()}),
            "gradient_norm": gradient_norm.item(),
            "alpha": alpha,
            "learning_rate": learning_rate,
        }
        if not all(map(math.isfinite, values.values())):
            raise FloatingPointError(
                f"step {self.step + 1} is not finite: "
                + ", ".join(f"{name} {value:g}" for name, value in values.items())
                + ". The weights are still those of the step before; lower the learning rate or look at the batch."
            )
        self.optimizer.step()
        self.averager.update()
        self.step += 1
        return values

    def state_dict(self) -> dict[str, Any]:
        """Everything that `load_state_dict` needs to go on as if training had never stopped."""
        return {
            "step": self.step,
            "videos": self.videos,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "regularizer": self.regularizer.state_dict(),
            "averager": self.averager.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave.

        Raises:
            ValueError: It was trained on other videos.
        """
        if state["videos"] != self.videos:
            raise ValueError(
                "the training set has other videos or classes than the run was begun with; give back the set of then "
                "(it may lie elsewhere), or begin a new run."
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.regularizer.load_state_dict(state["regularizer"])
        self.averager.load_state_dict(state["averager"])
        self.step = state["step"]

    def resume(self, checkpoint: Path) -> None:
        """Go on from a checkpoint, if there is one."""
        if checkpoint.exists():
            self.load_state_dict(load_state(checkpoint))
            self.journal.write("resume", step=self.step)
