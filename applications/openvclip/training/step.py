"""One step of fine-tuning: the gradients of its micro-batches, the update, the average."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from applications.openvclip import distributed
from applications.openvclip.data.loader import MicroBatch, TrainingOrder
from applications.openvclip.model.precision import Precision
from applications.openvclip.training.l2_penalty import L2Penalty
from applications.openvclip.training.optimisation import LearningRate
from applications.openvclip.training.parallel import number, synchronising, whole
from applications.openvclip.training.teacher import Teacher
from interpolate import InterpolatedWeightRegularizer, SWAAverager
from interpolate.weights import trainable_weights


@dataclass
class Step:
    """Takes a step of interpolated weight optimization with the micro-batches of all processes.

    The gradient is the mean over the clips of the whole batch, whichever process computes what part of it. With the
    alphas, which are functions of the seed, the step and the micro-batch, the trajectory does not depend on the number
    of processes, except for the order in which floats are summed.
    """

    encoder: nn.Module
    """What is trained."""
    model: nn.Module
    """The encoder as it is called: itself, or with what averages its gradients over processes."""
    class_embeddings: Tensor
    """(K, E): the closed label set."""
    optimizer: torch.optim.Optimizer
    learning_rate: LearningRate
    regularizer: InterpolatedWeightRegularizer | L2Penalty
    averager: SWAAverager | None
    """None for methods without averaging."""
    max_gradient_norm: float
    order: TrainingOrder
    """Which micro-batches a step has, and which of them are this process's."""
    alpha_per: Literal["micro-batch", "step"]
    """Whether each micro-batch has an alpha of its own, or all of a step the same."""
    clips_at_once: int
    """How many clips of a micro-batch go through the model together: memory grows with it, the gradient is the same."""
    precision: Precision
    teacher: Teacher | None = None
    """Whose answers are learnt besides the labels."""
    every: int = 1
    """The regularizer has a part in every so many steps, so many times as strong."""
    taken: int = 0
    """Steps so far."""

    def __post_init__(self) -> None:
        self._strength = self.regularizer.strength

    def __call__(
        self, micro_batches: Iterator[MicroBatch], asked: Callable[[], Sequence[float]] = tuple
    ) -> tuple[dict[str, float], list[float]]:
        """Both gradients of every micro-batch, clipped; stop if they are not finite; update; average on schedule.

        Args:
            micro_batches: Where the next ones of this process come from.
            asked: Gives numbers of this process to be summed over all processes on the way.

        Returns:
            What is worth knowing of the step, by name, and the sums.

        Raises:
            FloatingPointError: A loss or a gradient is not finite; the message names processes and videos. Nothing has
                been changed by the step.
        """
        learning_rate = self.learning_rate(self.taken)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.regularizer.strength = 0.0 if self.taken % self.every else self.every * self._strength
        alphas = [self.regularizer.alpha_of(self._alpha_index(m)) for m in range(self.order.micro_batches)]
        self.optimizer.zero_grad()
        waited, seen = 0.0, []
        with self.regularizer.one_step():
            for m in self.order.own:
                began = time.perf_counter()
                batch = next(micro_batches)
                waited += time.perf_counter() - began
                seen.append((m, batch.videos, self._backward(m, batch)))
            self.precision.scaler.unscale_(self.optimizer)
        losses = torch.stack([losses for _, _, losses in seen]).sum(0).tolist()
        loss, interpolated_loss, *sums = distributed.summed([*losses, *asked()])
        gradient_norm = number(nn.utils.clip_grad_norm_(self.encoder.parameters(), self.max_gradient_norm))
        values = {
            "loss": loss,
            **({} if self.regularizer.interpolated_loss is None else {"interpolated_loss": interpolated_loss}),
            "gradient_norm": gradient_norm,
            "alpha": sum(alphas) / len(alphas),
            "learning_rate": learning_rate,
            "waited_s": waited,
        }
        if not all(map(math.isfinite, values.values())) and not self._overflows(loss, gradient_norm):
            raise FloatingPointError(self._not_finite(values, seen))
        self.precision.scaler.step(self.optimizer)
        self.precision.scaler.update()
        if self.averager:
            self.averager.update()
        if self.teacher:
            self.teacher.update()
        self.taken += 1
        return values, sums

    def _backward(self, m: int, batch: MicroBatch) -> Tensor:
        """Add a micro-batch's part to the gradients; its part of the mean losses, plain and interpolated: (2,)."""
        scaler, n = self.precision.scaler, self.order.world_size
        parts = list(zip(batch.clips.split(self.clips_at_once), batch.labels.split(self.clips_at_once), strict=True))
        losses = torch.zeros(2, dtype=torch.float64, device=batch.clips.device)
        for i, (clips, labels) in enumerate(parts):
            torch.manual_seed(self._seed(m, i))
            last = m == self.order.own[-1] and i == len(parts) - 1
            share = len(labels) / self.order.batch_size
            target = labels
            if self.teacher:
                target = self.teacher.target(labels, lambda model, clips=clips: self._logits(model, clips))
            with synchronising(self.model, wanted=last):
                loss = self.regularizer.backward(
                    lambda model, clips, target, share=share: scaler.scale(
                        n * share * F.cross_entropy(self._logits(model, clips), target)
                    ),
                    clips,
                    target,
                    index=self._alpha_index(m),
                )
            losses[0] += loss.double()
            if self.regularizer.interpolated_loss is not None:
                losses[1] += self.regularizer.interpolated_loss.double()
        return losses / (n * scaler.get_scale())

    def _overflows(self, loss: float, gradient_norm: float) -> bool:
        """Whether gradients left the range of float16, so that the scaler leaves the update out and scales down."""
        scaler = self.precision.scaler
        return (
            scaler.is_enabled() and math.isfinite(loss) and not math.isfinite(gradient_norm) and scaler.get_scale() > 1
        )

    def _logits(self, model: nn.Module, clips: Tensor) -> Tensor:
        with self.precision.autocast():
            logits = model(clips, self.class_embeddings)
        return logits.float()

    def _alpha_index(self, m: int) -> int:
        return m if self.alpha_per == "micro-batch" else 0

    def _seed(self, m: int, part: int) -> int:
        """What dropout and the like draw from: a function of the place in training alone."""
        sequence = np.random.SeedSequence([self.order.seed, self.taken, m, part])
        return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))

    def _not_finite(self, values: dict[str, float], seen: Sequence[tuple[int, tuple[str, ...], Tensor]]) -> str:
        """Says of every process which of its micro-batches are not finite, and of which videos they are."""
        rank = distributed.rank()
        own = [
            (not bool(losses.isfinite().all()), f"micro-batch {m} on rank {rank} ({', '.join(videos)})")
            for m, videos, losses in seen
        ]
        all_of_them = [of_one for of_rank in distributed.gathered(own) for of_one in of_rank]
        spoilt = [text for is_spoilt, text in all_of_them if is_spoilt]
        numbers = ", ".join(f"{name} {value:g}" for name, value in values.items())
        where = "; ".join(spoilt or [text for _, text in all_of_them])
        return (
            f"step {self.taken + 1} is not finite: {numbers}. It comes from {'' if spoilt else 'the gradients of '}"
            f"{where}. The weights are still those of the step before; lower the learning rate or look at these videos."
        )

    def average(self) -> tuple[dict[str, Tensor], int]:
        """The average so far, out of its shards and on the CPU, and of how many snapshots; 0 before there are any and
        without averaging: the last weights then. All processes call it together."""
        if self.averager and self.averager.n_averaged:
            return whole(self.averager.weights), self.averager.n_averaged
        return whole(trainable_weights(self.encoder)), 0

    def state_dict(self) -> dict[str, Any]:
        """Everything that `load_state_dict` needs to go on as if training had never stopped.

        The anchor is not in it: what training began with is at hand when it goes on. Tensors are those in use, or
        shards of them; all processes call it together.
        """
        return {
            "taken": self.taken,
            "model": self.encoder.state_dict(),
            "optimizer": get_optimizer_state_dict(self.encoder, self.optimizer),
            "scaler": self.precision.scaler.state_dict(),
            **({"averager": self.averager.state_dict()} if self.averager else {}),
            **({"teacher": self.teacher.state_dict()} if self.teacher else {}),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self.encoder.load_state_dict(state["model"])
        set_optimizer_state_dict(self.encoder, self.optimizer, state["optimizer"])
        self.precision.scaler.load_state_dict(state["scaler"])
        if self.averager:
            self.averager.load_state_dict(state["averager"])
        if self.teacher:
            self.teacher.load_state_dict(state["teacher"])
        self.taken = self.regularizer.step = state["taken"]
