"""Callbacks for Lightning; needs the extra `lightning`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn

from interpolate._names import bare_name
from interpolate._sharding import is_sharded
from interpolate.averaging import SWAAverager, WeightAverager
from interpolate.regularizer import InterpolatedWeightRegularizer
from interpolate.weights import load_weights


class RegularizerCallback(Callback):
    """Adds interpolated weight regularization to a `LightningModule` with automatic optimization.

    Calls `training_step` a second time, at the interpolated weights and without its logging, between the plain forward
    and backward passes: both graphs are alive then. Sharded strategies are refused for that reason; with them, use
    manual optimization and `InterpolatedWeightRegularizer.backward`. A run that is resumed with `ckpt_path` keeps its
    anchor and its sequence of alphas.

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
        self._batch: dict[str, Any] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not pl_module.automatic_optimization:
            raise ValueError("RegularizerCallback needs automatic optimization; without it, call regularizer.backward.")
        if is_param_in_hook_signature(pl_module.training_step, "dataloader_iter", explicit=True):
            raise ValueError(
                "RegularizerCallback calls training_step twice with one batch; training_step(self, dataloader_iter) "
                "takes its own from the iterator. Let it take a batch, or call regularizer.backward by hand."
            )
        self.regularizer = self.make(pl_module)
        if self.regularizer.strategy != "functional":
            raise ValueError(
                "RegularizerCallback needs a model for the functional strategy, got one for "
                f"{self.regularizer.strategy!r}; use manual optimization and regularizer.backward."
            )
        if self._state is not None:
            self.regularizer.load_state_dict(self._state)
            self._state = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        takes_index = is_param_in_hook_signature(pl_module.training_step, "batch_idx", min_args=2)  # as Lightning asks
        self._batch = {"batch": batch, "batch_idx": batch_idx} if takes_index else {"batch": batch}

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        regularizer = self.regularizer
        assert regularizer is not None
        if not regularizer.strength:
            return
        factor = regularizer.strength / trainer.accumulate_grad_batches
        scaler = getattr(trainer.precision_plugin, "scaler", None)

        def run(model: nn.Module) -> Tensor:
            with trainer.precision_plugin.train_step_context():
                output: Any = pl_module.training_step(*self._batch.values())
            loss = output["loss"] if isinstance(output, Mapping) else output
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

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        _check_resumable(self, trainer, checkpoint, "the anchor would be the weights resumed from")


class AveragingCallback(Callback):
    """Averages the weights after every optimizer step; what is validated, chosen, saved and shipped is the average.

    - Validation while fitting is at the average, so a monitored metric and the "best" checkpoint are the average's.
    - A checkpoint's `state_dict` is the average: `load_from_checkpoint`, and `validate`, `test` and `predict` with
      `ckpt_path`, take it in any process, with this callback or without. `current_model_state` is theta, which `fit`
      with `ckpt_path` goes on with, as with Lightning's own `WeightAveraging`.
    - After `trainer.fit` the module holds the average. After an exception it holds theta, and is still validated and
      tested at the average.

    Until the first snapshot there is no average and theta stands for it; a fit that ends so warns. With weights sharded
    by `ModelParallelStrategy` (FSDP2), rank 0 saves whole what is not Lightning's own `state_dict`. FSDP1 and DeepSpeed
    are refused, and so are checkpoints with `save_weights_only`, of which Lightning tells callbacks nothing.

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
        self._theta: dict[str, Any] | None = None  # after fitting, when the module holds the average

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if isinstance(trainer.strategy, (FSDPStrategy, DeepSpeedStrategy)):
            raise ValueError(
                f"AveragingCallback can't average the shards of {type(trainer.strategy).__name__}. Use "
                "ModelParallelStrategy (FSDP2) or DDP."
            )
        if any(getattr(callback, "save_weights_only", False) for callback in trainer.checkpoint_callbacks):
            raise ValueError(
                "AveragingCallback can't put the average into checkpoints with save_weights_only=True. Save all of it: "
                "its state_dict is the average."
            )
        self._theta = None
        self.averager = self.make(pl_module)
        if self._state is not None:
            self.load_state_dict(self._state)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert self.averager is not None
        if trainer.global_step > self._step:  # not while gradients accumulate
            self._step = trainer.global_step
            self.averager.update()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        averager = self.averager
        assert averager is not None
        self._theta = _whole(pl_module.state_dict())
        if averager.n_averaged:
            load_weights(pl_module, {**averager.weights, **averager.buffers})
        else:
            warnings.warn(
                f"no weights have been averaged in {averager.step} steps: the first snapshot is due at step "
                f"{averager.start_step + averager.cycle_steps}. The module keeps its own weights.",
                stacklevel=2,
            )

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._enter(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._leave()

    on_test_start = on_predict_start = on_validation_start
    on_test_end = on_predict_end = on_validation_end

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._leave()

    def state_dict(self) -> dict[str, Any]:
        return {} if self.averager is None else _whole(self.averager.state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Called before `on_fit_start`, or after it where weights are loaded once they are sharded."""
        self._state = state_dict
        if self.averager is not None:
            self.averager.load_state_dict(state_dict)
            self._state = None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._theta is not None:
            checkpoint["current_model_state"] = self._theta
        elif self.averager is not None and self.averager.n_averaged:
            validating = self._applied is not None
            self._leave()
            checkpoint["current_model_state"] = _whole(pl_module.state_dict())
            with self.averager.applied():
                state_dict = trainer.strategy.lightning_module_state_dict()
                checkpoint["state_dict"] = {n: t.clone() if isinstance(t, Tensor) else t for n, t in state_dict.items()}
            if validating:
                self._enter(trainer, pl_module)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        _check_resumable(self, trainer, checkpoint, "the average would lack all steps before it")
        if trainer.state.fn == TrainerFn.FITTING and "current_model_state" in checkpoint:
            own = {bare_name(name) for name, _ in (*pl_module.named_parameters(), *pl_module.named_buffers())}
            theta = {bare_name(name): tensor for name, tensor in checkpoint["current_model_state"].items()}
            load_weights(pl_module, {name: tensor for name, tensor in theta.items() if name in own})

    def _enter(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loaded = trainer.state.fn != TrainerFn.FITTING and trainer.ckpt_path is not None
        if self._theta is not None or loaded or self.averager is None or self.averager.model is not pl_module:
            return
        if self.averager.n_averaged:
            self._applied = self.averager.applied()
            self._applied.__enter__()

    def _leave(self) -> None:
        if self._applied is not None:
            context, self._applied = self._applied, None
            context.__exit__(None, None, None)


def _check_resumable(callback: Callback, trainer: Trainer, checkpoint: dict[str, Any], otherwise: str) -> None:
    if trainer.state.fn == TrainerFn.FITTING and callback.state_key not in checkpoint["callbacks"]:
        raise ValueError(
            f"{trainer.ckpt_path} was saved without {type(callback).__name__}, and {otherwise}. Resume without the "
            "callback, or load the weights and fit without ckpt_path."
        )


def _whole(state: Any) -> Any:
    """A copy of a state on the CPU, without shards, for files that rank 0 writes alone; to be called on every rank."""
    if isinstance(state, Mapping):
        return {name: _whole(value) for name, value in state.items()}
    if not isinstance(state, Tensor):
        return state
    tensor: Any = state.detach()
    if is_sharded(tensor):
        tensor = tensor.to(tensor.device_mesh.device_type).full_tensor()  # where ranks communicate
    return tensor.to("cpu", copy=True)
