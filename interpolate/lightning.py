"""Callbacks for Lightning; needs the extra `lightning`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from interpolate.averaging import SWAAverager, WeightAverager
from interpolate.regularizer import InterpolatedWeightRegularizer


class RegularizerCallback(Callback):
    """Adds interpolated weight regularization to a `LightningModule` with automatic optimization.

    Calls `training_step` a second time, at the interpolated weights and without its logging, between the plain forward
    and backward passes: both graphs are alive then. Sharded strategies are refused for that reason; with them, use
    manual optimization and `InterpolatedWeightRegularizer.backward`.

    Args:
        make: Makes the regularizer from the module when training starts.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[RegularizerCallback()], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self, make: Callable[[nn.Module], InterpolatedWeightRegularizer] = InterpolatedWeightRegularizer
    ) -> None:
        self.make = make
        self.regularizer: InterpolatedWeightRegularizer | None = None
        """Made when training starts."""
        self._state: dict[str, Any] | None = None
        self._batch: tuple[Any, int] = (None, 0)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not pl_module.automatic_optimization:
            raise ValueError("RegularizerCallback needs automatic optimization; without it, call regularizer.backward.")
        self.regularizer = self.make(pl_module)
        if self.regularizer.strategy != "functional":
            raise ValueError(
                "RegularizerCallback needs a model for the functional strategy, got one for "
                f"{self.regularizer.strategy!r}; use manual optimization and regularizer.backward."
            )
        if self._state is not None:
            self.regularizer.load_state_dict(self._state)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._batch = batch, batch_idx

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        regularizer = self.regularizer
        assert regularizer is not None
        factor = regularizer.strength / trainer.accumulate_grad_batches
        scaler = getattr(trainer.precision_plugin, "scaler", None)

        def run(model: nn.Module) -> Tensor:
            with trainer.precision_plugin.train_step_context():
                output: Any = pl_module.training_step(*self._batch)
            loss = output["loss"] if isinstance(output, dict) else output
            (factor * (loss if scaler is None else scaler.scale(loss))).backward()
            return loss.detach()

        pl_module.log = pl_module.log_dict = lambda *_, **__: None
        try:
            regularizer.interpolated_loss = regularizer.run_interpolated(run)
        finally:
            del pl_module.log, pl_module.log_dict

    def state_dict(self) -> dict[str, Any]:
        return {} if self.regularizer is None else self.regularizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._state = state_dict


class AveragingCallback(Callback):
    """Averages the weights after every optimizer step, validates and tests at the average, and resumes with the run.

    After `trainer.fit` the module holds its own weights, and `averager.weights` the average.

    Args:
        make: Makes the averager from the module when training starts, for instance
            `lambda model: SWAAverager(model, start_step=1000, cycle_steps=100)`; steps are optimizer steps.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[AveragingCallback()], logger=False, enable_checkpointing=False)
    """

    def __init__(self, make: Callable[[nn.Module], WeightAverager] = SWAAverager) -> None:
        self.make = make
        self.averager: WeightAverager | None = None
        """Made when training starts."""
        self._state: dict[str, Any] | None = None
        self._step = 0
        self._applied: AbstractContextManager[nn.Module] | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.averager = self.make(pl_module)
        if self._state is not None:
            self.averager.load_state_dict(self._state)
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert self.averager is not None
        if trainer.global_step > self._step:  # not while gradients accumulate
            self._step = trainer.global_step
            self.averager.update()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._enter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._leave()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._enter()

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._leave()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._leave()

    def state_dict(self) -> dict[str, Any]:
        return {} if self.averager is None else self.averager.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._state = state_dict

    def _enter(self) -> None:
        if self.averager is not None and self.averager.n_averaged:
            self._applied = self.averager.applied()
            self._applied.__enter__()

    def _leave(self) -> None:
        if self._applied is not None:
            applied, self._applied = self._applied, None
            applied.__exit__(None, None, None)
