import copy
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from random_modules import identical
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from interpolate import InterpolatedWeightRegularizer, SWAAverager
from interpolate.lightning import AveragingCallback, RegularizerCallback
from interpolate.weights import trainable_weights

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's advice on workers, loggers and the like

F = nn.functional


class Tiny(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
        self.validated_at: list[Tensor] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = F.mse_loss(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.validated_at.append(self.net[0].weight.detach().clone())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def data() -> DataLoader:
    torch.manual_seed(1)
    return DataLoader(TensorDataset(torch.randn(8, 3), torch.randn(8, 1)), batch_size=2)


def anchor() -> dict[str, Tensor]:
    torch.manual_seed(2)
    return {n: torch.randn_like(p) for n, p in trainable_weights(Tiny()).items()}


def fit(model: Tiny, *callbacks, folder: Path, checkpoint: str | None = None, **options) -> Trainer:
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    trainer = Trainer(
        accelerator="cpu", default_root_dir=folder, callbacks=list(callbacks), **{"max_epochs": 1, **quiet, **options}
    )
    trainer.fit(model, data(), data(), ckpt_path=checkpoint, weights_only=True if checkpoint else None)
    return trainer


@pytest.mark.parametrize("accumulate", [1, 2])
def test_training_equals_a_plain_loop_with_the_regularizer(accumulate: int, tmp_path: Path):
    model, reference = Tiny(), Tiny()
    callback = RegularizerCallback(lambda m: InterpolatedWeightRegularizer(m, anchor=anchor(), seed=5))
    trainer = fit(model, callback, folder=tmp_path, accumulate_grad_batches=accumulate)

    regularizer = InterpolatedWeightRegularizer(reference, anchor=anchor(), seed=5)
    optimizer = reference.configure_optimizers()
    for i, (x, y) in enumerate(data(), start=1):
        loss = regularizer.backward(lambda m, x=x, y=y: F.mse_loss(m.net(x), y) / accumulate)
        if i % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(dict(model.named_parameters()), dict(reference.named_parameters()))
    assert callback.regularizer.step == 4
    torch.testing.assert_close(trainer.callback_metrics["loss"], loss * accumulate)  # the plain one is logged


def test_validation_sees_the_average_and_training_goes_on_at_theta(tmp_path: Path):
    model, plain = Tiny(), Tiny()
    callback = AveragingCallback()
    fit(model, callback, folder=tmp_path, max_epochs=2, accumulate_grad_batches=2)
    fit(plain, folder=tmp_path, max_epochs=2, accumulate_grad_batches=2)
    assert identical(dict(model.named_parameters()), dict(plain.named_parameters()))
    assert callback.averager.n_averaged == 4  # optimizer steps
    assert torch.equal(model.validated_at[-1], callback.averager.weights["net.0.weight"])
    assert not torch.equal(model.validated_at[-1], model.net[0].weight)


def test_resuming_equals_never_stopping(tmp_path: Path):
    def callbacks() -> tuple[RegularizerCallback, AveragingCallback]:
        return (
            RegularizerCallback(lambda m: InterpolatedWeightRegularizer(m, anchor=anchor())),
            AveragingCallback(lambda m: SWAAverager(m, start_step=1, cycle_steps=2)),
        )

    uninterrupted, whole = Tiny(), callbacks()
    fit(uninterrupted, *whole, folder=tmp_path, max_epochs=2)
    trainer = fit(Tiny(), *callbacks(), folder=tmp_path, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed, parts = Tiny(), callbacks()
    fit(resumed, *parts, folder=tmp_path, max_epochs=2, checkpoint=str(tmp_path / "half.ckpt"))
    assert identical(dict(resumed.named_parameters()), dict(uninterrupted.named_parameters()))
    assert identical(parts[1].averager.weights, whole[1].averager.weights)


def test_an_exception_while_validating_leaves_the_models_own_weights(tmp_path: Path):
    class Failing(Tiny):
        def on_validation_epoch_end(self) -> None:
            if not self.trainer.sanity_checking:
                raise ZeroDivisionError

    model, plain = Failing(), Tiny()
    with pytest.raises(ZeroDivisionError):
        fit(model, AveragingCallback(), folder=tmp_path)
    fit(plain, folder=tmp_path)
    assert identical(dict(model.named_parameters()), dict(plain.named_parameters()))


def test_modules_that_optimize_by_hand_or_need_another_strategy_are_refused(tmp_path: Path):
    model = Tiny()
    model.automatic_optimization = False
    with pytest.raises(ValueError, match="needs automatic optimization"):
        fit(model, RegularizerCallback(), folder=tmp_path)
    model = Tiny()
    model.twice = model.net[0]
    with pytest.raises(ValueError, match="functional strategy, got one for 'in_place'"):
        fit(model, RegularizerCallback(), folder=tmp_path)


def test_what_lightning_saves_is_read(tmp_path: Path):
    from interpolate.checkpoints import Checkpoint

    trainer = fit(model := Tiny(), folder=tmp_path)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    with Checkpoint(tmp_path / "last.ckpt") as checkpoint:
        assert torch.equal(checkpoint.tensor("net.0.weight"), copy.deepcopy(model).net[0].weight)
