import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import FSDPStrategy
from random_modules import identical
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from interpolate import InterpolatedWeightRegularizer, SWAAverager
from interpolate.checkpoints import Checkpoint
from interpolate.lightning import AveragingCallback, RegularizerCallback
from interpolate.weights import trainable_weights

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),
]  # Lightning's advice on workers, loggers and the like

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
        self.log("score", self.net[0].weight.sum())

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.validated_at.append(self.net[0].weight.detach().clone())

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.net[0].weight.detach().clone()

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


class Recorder(Callback):
    """Keeps theta and the average after every optimizer step, computed by itself."""

    def __init__(self) -> None:
        self.theta: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_) -> None:
        if len(self.theta) < trainer.global_step:
            self.theta.append({n: p.detach().clone() for n, p in pl_module.named_parameters()})

    def average(self, steps: int) -> dict[str, Tensor]:
        return {n: torch.stack([theta[n] for theta in self.theta[:steps]]).mean(0) for n in self.theta[0]}


def test_training_goes_on_at_theta_and_everything_else_sees_the_average(tmp_path: Path):
    model, plain, recorder, callback = Tiny(), Tiny(), Recorder(), AveragingCallback()
    trainer = fit(model, recorder, callback, folder=tmp_path, max_epochs=2, accumulate_grad_batches=2)
    fit(plain, folder=tmp_path, max_epochs=2, accumulate_grad_batches=2)
    assert identical(recorder.theta[-1], dict(plain.named_parameters()))
    assert callback.averager.n_averaged == 4  # optimizer steps
    torch.testing.assert_close(model.validated_at[-1], recorder.average(4)["net.0.weight"])
    torch.testing.assert_close(trainer.callback_metrics["score"], recorder.average(4)["net.0.weight"].sum())
    torch.testing.assert_close(dict(model.named_parameters()), recorder.average(4))
    for run in (trainer.validate, trainer.test):
        run(model, data())
        assert torch.equal(model.validated_at[-1], callback.averager.weights["net.0.weight"])
    assert torch.equal(trainer.predict(model, data())[0], callback.averager.weights["net.0.weight"])
    assert torch.equal(model.net[0].weight, callback.averager.weights["net.0.weight"])


def best(folder: Path) -> ModelCheckpoint:
    options = {"monitor": "score", "mode": "max", "save_top_k": 1, "save_last": True}
    return ModelCheckpoint(folder, filename="best", **options)


ELSEWHERE = """
import sys, warnings
warnings.simplefilter("ignore")
import torch
from lightning.pytorch import Trainer
from test_lightning import Tiny, data
from interpolate.lightning import AveragingCallback

kept = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
for callbacks in ([], [AveragingCallback()]):
    model, trainer = Tiny(), Trainer(accelerator="cpu", callbacks=callbacks, **kept)
    trainer.validate(model, data(), ckpt_path=sys.argv[1], weights_only=True)
    trainer.test(model, data(), ckpt_path=sys.argv[1], weights_only=True)
    seen = [*model.validated_at, *trainer.predict(model, data(), ckpt_path=sys.argv[1], weights_only=True)]
    expected = torch.load(sys.argv[2])
    assert len(seen) == 12 and all(torch.equal(x, expected) for x in seen), (seen, expected)
    assert torch.equal(Tiny.load_from_checkpoint(sys.argv[1], weights_only=True).net[0].weight, expected)
"""


@pytest.mark.parametrize("name", ["best", "last"])
def test_a_checkpoint_is_the_average_in_another_process(name: str, tmp_path: Path):
    recorder, checkpoints = Recorder(), best(tmp_path)
    trainer = fit(
        Tiny(),
        recorder,
        AveragingCallback(),
        checkpoints,
        folder=tmp_path,
        max_epochs=3,
        enable_checkpointing=True,
    )
    scores = [recorder.average(steps)["net.0.weight"].sum() for steps in (4, 8, 12)]
    torch.testing.assert_close(checkpoints.best_model_score, max(scores))
    steps = 12 if name == "last" else 4 * (1 + scores.index(max(scores)))
    with Checkpoint(tmp_path / f"{name}.ckpt::state_dict") as average:
        torch.testing.assert_close(average.tensor("net.0.weight"), recorder.average(steps)["net.0.weight"])
        torch.save(average.tensor("net.0.weight"), tmp_path / "expected.pt")
    with Checkpoint(tmp_path / f"{name}.ckpt::current_model_state") as theta:
        assert torch.equal(theta.tensor("net.0.weight"), recorder.theta[steps - 1]["net.0.weight"])
    trainer.test(model := Tiny(), data(), ckpt_path=str(tmp_path / f"{name}.ckpt"), weights_only=True)
    assert torch.equal(model.validated_at[-1], torch.load(tmp_path / "expected.pt"))  # also where a run has ended
    command = [sys.executable, "-c", ELSEWHERE, str(tmp_path / f"{name}.ckpt"), str(tmp_path / "expected.pt")]
    tests = Path(__file__).parent
    subprocess.run(command, check=True, cwd=tests, env={**os.environ, "PYTHONPATH": str(tests.parent)})


def test_a_checkpoint_saved_while_validating_holds_average_and_theta(tmp_path: Path):
    class Saving(Tiny):
        def on_validation_epoch_end(self) -> None:
            if not self.trainer.sanity_checking:
                self.trainer.save_checkpoint(tmp_path / "inside.ckpt")

    recorder = Recorder()
    fit(Saving(), recorder, callback := AveragingCallback(), folder=tmp_path)
    saved = torch.load(tmp_path / "inside.ckpt", weights_only=True)
    assert identical(saved["state_dict"], callback.averager.weights)
    assert identical(saved["current_model_state"], recorder.theta[3])


def test_an_interrupted_fit_leaves_theta_and_is_tested_at_the_average(tmp_path: Path):
    class Interrupted(Tiny):
        def on_train_epoch_end(self) -> None:
            raise ZeroDivisionError

    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    callback = AveragingCallback()
    trainer = Trainer(accelerator="cpu", callbacks=[recorder := Recorder(), callback], max_epochs=1, **quiet)
    with pytest.raises(ZeroDivisionError):
        trainer.fit(model := Interrupted(), data())
    assert identical(dict(model.named_parameters()), recorder.theta[-1])
    trainer.test(model, data())
    assert torch.equal(model.validated_at[-1], callback.averager.weights["net.0.weight"])
    assert identical(dict(model.named_parameters()), recorder.theta[-1])


def test_a_fit_without_a_snapshot_warns(tmp_path: Path):
    callback = AveragingCallback(lambda m: SWAAverager(m, start_step=4))
    with pytest.warns(UserWarning, match="averaged in 4 steps: the first snapshot is due at step 5"):
        fit(Tiny(), callback, folder=tmp_path)


def test_what_cannot_be_averaged_or_saved_is_refused(tmp_path: Path):
    weights_only = ModelCheckpoint(tmp_path, save_weights_only=True)
    with pytest.raises(ValueError, match="save_weights_only=True"):
        fit(Tiny(), AveragingCallback(), weights_only, folder=tmp_path, enable_checkpointing=True)
    with pytest.raises(ValueError, match="can't average the shards of FSDPStrategy"):
        AveragingCallback().on_fit_start(SimpleNamespace(strategy=FSDPStrategy()), Tiny())


@pytest.mark.parametrize("callback", [AveragingCallback, RegularizerCallback])
def test_resuming_from_a_checkpoint_without_the_callbacks_state_is_refused(callback: type, tmp_path: Path):
    fit(Tiny(), folder=tmp_path).save_checkpoint(tmp_path / "plain.ckpt")
    with pytest.raises(ValueError, match=rf"plain\.ckpt was saved without {callback.__name__}"):
        fit(Tiny(), callback(), folder=tmp_path, max_epochs=2, checkpoint=str(tmp_path / "plain.ckpt"))


def test_a_training_step_need_not_take_the_index_of_the_batch(tmp_path: Path):
    class Short(Tiny):
        def training_step(self, batch: list[Tensor]) -> Tensor:
            return super().training_step(batch, 0)

    class Other(Tiny):
        def training_step(self, batch: list[Tensor], number: int) -> dict[str, Tensor]:
            return {"loss": super().training_step(batch, number)}

    models = [Tiny(), Short(), Other()]
    for model in models:
        fit(model, RegularizerCallback(lambda m: InterpolatedWeightRegularizer(m, anchor=anchor())), folder=tmp_path)
    assert identical(dict(models[1].named_parameters()), dict(models[0].named_parameters()))
    assert identical(dict(models[2].named_parameters()), dict(models[0].named_parameters()))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_resuming_equals_never_stopping(accumulate: int, tmp_path: Path):
    def callbacks() -> tuple[RegularizerCallback, AveragingCallback]:
        return (
            RegularizerCallback(
                lambda m: InterpolatedWeightRegularizer(m, anchor=None if accumulate == 1 else anchor())
            ),
            AveragingCallback(lambda m: SWAAverager(m, start_step=1)),
        )

    options = {"folder": tmp_path, "accumulate_grad_batches": accumulate}
    uninterrupted, whole, recorder = Tiny(), callbacks(), Recorder()
    fit(uninterrupted, *whole, recorder, max_epochs=4, **options)
    trainer = fit(Tiny(), *callbacks(), max_epochs=2, **options)
    trainer.save_checkpoint(tmp_path / "half.ckpt")  # the module holds the average by now
    resumed, parts, rest = Tiny(), callbacks(), Recorder()
    fit(resumed, *parts, rest, max_epochs=4, checkpoint=str(tmp_path / "half.ckpt"), **options)
    assert identical(rest.theta[-1], recorder.theta[-1])
    assert identical(dict(resumed.named_parameters()), dict(uninterrupted.named_parameters()))
    assert identical(parts[1].averager.weights, whole[1].averager.weights)
    assert parts[1].averager.n_averaged == whole[1].averager.n_averaged == 16 // accumulate - 1
    assert (parts[0].regularizer.step, parts[0].regularizer.alpha) == (16, whole[0].regularizer.alpha)


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


def test_what_a_training_step_counts_and_logs_is_of_the_plain_pass_alone(tmp_path: Path):
    from torchmetrics import MeanMetric, MetricCollection, SumMetric

    class Counting(Tiny):
        def __init__(self) -> None:
            super().__init__()
            self.samples, self.mean = SumMetric(), MeanMetric()
            self.collection = MetricCollection({"samples": SumMetric()})
            self.logged: list[float] = []

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            for metric in (self.samples, self.collection):
                metric.update(torch.tensor(len(batch[0])))
            self.log("mean", self.mean(loss), on_step=False, on_epoch=True)
            self.log_dict({"twice": 2 * loss})
            return loss

        def on_train_batch_end(self, outputs, batch, batch_idx) -> None:
            self.logged.append(outputs["loss"].item())

        def on_train_epoch_end(self) -> None:
            self.counted = [self.samples.compute(), self.collection.compute()["samples"], self.mean.compute()]

    model = Counting()
    trainer = fit(
        model, RegularizerCallback(lambda m: InterpolatedWeightRegularizer(m, anchor=anchor())), folder=tmp_path
    )
    assert [count.item() for count in model.counted[:2]] == [8, 8]
    losses = torch.tensor(model.logged)
    torch.testing.assert_close(model.counted[2], losses.mean())
    torch.testing.assert_close(trainer.callback_metrics["twice"], 2 * losses[-1])


def test_modules_that_optimize_by_hand_or_need_another_strategy_are_refused(tmp_path: Path):
    model = Tiny()
    model.automatic_optimization = False
    with pytest.raises(ValueError, match="needs automatic optimization"):
        fit(model, RegularizerCallback(), folder=tmp_path)
    in_place = RegularizerCallback(lambda model: InterpolatedWeightRegularizer(model, strategy="in_place"))
    with pytest.raises(ValueError, match="functional strategy, got one for 'in_place'"):
        fit(Tiny(), in_place, folder=tmp_path)

    class Iterating(Tiny):
        def training_step(self, dataloader_iter) -> Tensor:
            return super().training_step(next(dataloader_iter)[0], 0)

    with pytest.raises(ValueError, match="takes its own from the iterator"):
        fit(Iterating(), RegularizerCallback(), folder=tmp_path)
