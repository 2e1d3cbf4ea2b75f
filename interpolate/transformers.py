"""A mixin for the `Trainer` of Hugging Face; needs the extra `transformers`."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from interpolate._names import by_bare_name, unwrapped
from interpolate._sharding import reshard
from interpolate.averaging import WeightAverager
from interpolate.regularizer import InterpolatedWeightRegularizer
from interpolate.state import load_state, save_state
from interpolate.weights import load_weights, trainable_weights


class InterpolatedTrainer(Trainer):
    """A `Trainer` with interpolated weight regularization, weight averaging, or both; also a mixin before others.

    With a regularizer, every training step is made twice, at the interpolated weights first, with the trainer's own
    loss, precision and accumulation of gradients; each micro-batch has its alpha.

    With an averager, every optimizer step updates the average, and what is evaluated, chosen, saved and shipped is the
    average:

    - `evaluate` and `predict` are at the average, and with them `metric_for_best_model`.
    - A checkpoint's model, as `from_pretrained` and `load_best_model_at_end` find it, is the average, in any process.
      The weights being trained are saved beside it, and `train(resume_from_checkpoint=...)` goes on with them.
    - After `train` the model holds the average, or that of the best checkpoint with `load_best_model_at_end`, and
      `save_model` and `push_to_hub` ship it. `averager.weights` is the last average in float32.

    Until the first snapshot there is no average and the weights being trained stand for it; a training that ends so
    warns. Resuming equals never stopping, on any number of processes, under DDP and FSDP2. FSDP1 and DeepSpeed are
    refused.

    Args:
        regularizer: Makes the regularizer from the prepared model (wrapped, sharded) when training starts.
        averager: Makes the averager from the prepared model when training starts, for instance
            `lambda model: SWAAverager(model, start_step=1000, cycle_steps=100)`; steps are optimizer steps.
        args: As for `transformers.Trainer`.
        kwargs: As for `transformers.Trainer`.

    Raises:
        ValueError: Neither is given, or an object instead of what makes it.

    Example:
        >>> from interpolate import EMAAverager
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
        >>> trainer = InterpolatedTrainer(
        ...     model=BertForSequenceClassification(config),
        ...     regularizer=lambda model: InterpolatedWeightRegularizer(model, strength=0.5),
        ...     averager=EMAAverager,
        ... )
    """

    def __init__(
        self,
        *args: Any,
        regularizer: Callable[[nn.Module], InterpolatedWeightRegularizer] | None = None,
        averager: Callable[[nn.Module], WeightAverager] | None = None,
        **kwargs: Any,
    ) -> None:
        for made in (regularizer, averager):
            if isinstance(made, (InterpolatedWeightRegularizer, WeightAverager)):
                raise ValueError(
                    f"the trainer wraps or shards the model before training, and a {type(made).__name__} must be made "
                    "afterwards: give what makes it from a model, for instance "
                    f"lambda model: {type(made).__name__}(model)."
                )
        if regularizer is averager is None:
            raise ValueError("InterpolatedTrainer needs a regularizer, an averager, or both.")
        super().__init__(*args, **kwargs)
        self._make_regularizer = regularizer
        self._make_averager = averager
        self.regularizer: InterpolatedWeightRegularizer | None = None
        """Made when training starts."""
        self.averager: WeightAverager | None = None
        """Made when training starts."""
        self._resumed_from: str | None = None
        self._at_theta = False  # whether the model holds the weights being trained: neither before nor after training
        self.add_callback(_Steps(self))

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        plain, regularizer = super().training_step, self.regularizer
        if regularizer is not None and regularizer.strength:
            with self._backward_scaled(regularizer.strength):
                regularizer.interpolated_loss = regularizer.run_interpolated(
                    lambda model: plain(model, inputs, *args, **kwargs)
                )
        return plain(model, inputs, *args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        with self._at_average():
            return super().evaluate(*args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        with self._at_average():
            return super().predict(*args, **kwargs)

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        with self._at_average():
            super().save_model(*args, **kwargs)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self._at_theta:
            raise RuntimeError("a checkpoint to resume from can only be saved in training, and not within evaluate.")
        for part, state in self._parts().items():
            save_state(os.path.join(output_dir, part), state)
        with self._at_average():  # under FSDP the model is saved here
            super()._save_optimizer_and_scheduler(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        self._resumed_from = checkpoint

    @property
    def _prepared(self) -> nn.Module:
        model: Any = self.model_wrapped
        return model

    def _begin(self) -> None:
        model = self._prepared
        if self.is_deepspeed_enabled or any(type(m).__name__ == "FullyShardedDataParallel" for m in model.modules()):
            raise ValueError("InterpolatedTrainer can't see weights through DeepSpeed or FSDP1. Use FSDP2 or DDP.")
        self.regularizer = self._make_regularizer and self._make_regularizer(model)
        self.averager = self._make_averager and self._make_averager(model)
        self._at_theta = True
        checkpoint, self._resumed_from = self._resumed_from, None
        if checkpoint is not None:
            self._resume(checkpoint)

    def _resume(self, checkpoint: str) -> None:
        parts = self._parts()
        saved = [part for part in ("regularizer", "averager") if os.path.isdir(os.path.join(checkpoint, part))]
        if saved != list(parts):
            raise ValueError(
                f"{checkpoint} was saved with {' and '.join(saved) or 'no regularizer and no averager'}, and can't be "
                f"resumed with {' and '.join(parts)}. Resume as it was trained and saved (not with save_only_model), "
                "or start a new training from its weights."
            )
        for part, state in parts.items():
            load_state(os.path.join(checkpoint, part), state)
        reshard(self._prepared)
        if self.regularizer is not None:
            self.regularizer.load_state_dict(parts["regularizer"])
        if self.averager is not None:
            self.averager.load_state_dict(parts["averager"]["average"])

    def _parts(self) -> dict[str, dict[str, Any]]:
        """What is saved in folders of a checkpoint, shard by shard; loading it writes into the model's own weights."""
        parts = {}
        if self.regularizer is not None:
            parts["regularizer"] = self.regularizer.state_dict()
        if self.averager is not None:
            buffers = by_bare_name(unwrapped(self._prepared).named_buffers())
            theta = {name: p.detach() for name, p in trainable_weights(self._prepared).items()}
            theta |= {name: buffers[name] for name in self.averager.buffers}
            parts["averager"] = {"average": self.averager.state_dict(), "theta": theta}
        return parts

    def _end(self) -> None:
        self._at_theta = False
        if self.averager is None or (self.args.load_best_model_at_end and self.state.best_model_checkpoint):
            return
        if self.averager.n_averaged:
            load_weights(self._prepared, {**self.averager.weights, **self.averager.buffers})
        else:
            warnings.warn(
                f"no weights have been averaged in {self.averager.step} steps: the first snapshot is due at step "
                f"{self.averager.start_step + self.averager.cycle_steps}. The model keeps its own weights.",
                stacklevel=2,
            )

    @contextmanager
    def _at_average(self) -> Iterator[None]:
        if not self._at_theta or self.averager is None or not self.averager.n_averaged:
            yield
            return
        self._at_theta = False
        try:
            with self.averager.applied():
                yield
        finally:
            self._at_theta = True

    @contextmanager
    def _backward_scaled(self, factor: float) -> Iterator[None]:
        """Scales the loss where every trainer's own `training_step` and `compute_loss` hand it over."""
        backward, losses = self.accelerator.backward, []

        def scaled(loss: Tensor, **kwargs: Any) -> None:
            losses.append(loss)
            backward(factor * loss, **kwargs)

        self.accelerator.backward = scaled
        try:
            yield
        finally:
            self.accelerator.backward = backward
        if not losses:
            raise RuntimeError(
                f"training_step of {type(self).__name__} must call self.accelerator.backward(loss), where the "
                "regularizer's strength is applied."
            )


class _Steps(TrainerCallback):
    def __init__(self, trainer: InterpolatedTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer._begin()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.trainer.averager is not None:
            self.trainer.averager.update()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer._end()
