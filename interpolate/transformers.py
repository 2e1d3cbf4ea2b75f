"""A mixin and a callback for the `Trainer` of Hugging Face; needs the extra `transformers`."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from interpolate.atomic import replacing
from interpolate.averaging import SWAAverager, WeightAverager
from interpolate.regularizer import InterpolatedWeightRegularizer


class RegularizedTrainer(Trainer):
    """A `Trainer` that adds interpolated weight regularization; also a mixin before other trainers.

    Every training step is made twice, at the interpolated weights first, with the trainer's own precision and
    accumulation of gradients. For FSDP, make the regularizer after the model has been sharded.

    Args:
        regularizer: Of the model that is given to the trainer.
        kwargs: As for `transformers.Trainer`.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
        >>> model = BertForSequenceClassification(config)
        >>> trainer = RegularizedTrainer(model=model, regularizer=InterpolatedWeightRegularizer(model))
    """

    def __init__(self, *args: Any, regularizer: InterpolatedWeightRegularizer, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.model is not regularizer.model:
            raise ValueError("the regularizer must be made with the model that is given to the trainer.")
        self.regularizer = regularizer
        self._factor = 1.0

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        plain = super().training_step
        self._factor = self.regularizer.strength
        try:
            loss = self.regularizer.run_interpolated(lambda model: plain(model, inputs, *args, **kwargs))
        finally:
            self._factor = 1.0
        self.regularizer.interpolated_loss = loss / self.regularizer.strength if self.regularizer.strength else None
        return plain(model, inputs, *args, **kwargs)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss: Any = super().compute_loss(*args, **kwargs)
        return loss if self._factor == 1 else self._factor * loss


class AveragingCallback(TrainerCallback):
    """Averages the weights after every optimizer step and saves and resumes the average with the trainer's checkpoints.

    To evaluate at the average: `with callback.averager.applied(): trainer.evaluate()`.

    Args:
        make: Makes the averager from the model when training starts.

    Example:
        >>> callback = AveragingCallback(lambda model: SWAAverager(model, start_step=100, cycle_steps=10))
    """

    FILE = "averager.pt"

    def __init__(self, make: Callable[[nn.Module], WeightAverager] = SWAAverager) -> None:
        self.make = make
        self.averager: WeightAverager | None = None
        """Made when training starts."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.averager = self.make(kwargs["model"])
        if state.global_step:  # resumed
            self.averager.load_state_dict(torch.load(self._file(args, state), weights_only=True))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        assert self.averager is not None
        self.averager.update()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        assert self.averager is not None
        if state.is_world_process_zero:
            with replacing(self._file(args, state)) as file:
                torch.save(self.averager.state_dict(), file)

    def _file(self, args: TrainingArguments, state: TrainerState) -> str:
        return os.path.join(str(args.output_dir), f"checkpoint-{state.global_step}", self.FILE)
