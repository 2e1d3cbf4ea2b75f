"""The trainer of Lightning on two ranks, with DDP and with weights sharded by FSDP2."""

import os
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from random_modules import identical
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from two_ranks import WORLD_SIZE, on_two_ranks

from interpolate._names import unwrapped

pytestmark = pytest.mark.slow

F = nn.functional


def full(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone() for n, t in tensors.items()}


def weights(model: nn.Module) -> dict[str, Tensor]:
    return full(dict(unwrapped(model).named_parameters()))


def mean(snapshots: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {n: torch.stack([snapshot[n] for snapshot in snapshots]).mean(0) for n in snapshots[0]}


def shared_folder() -> Path:
    """One folder for both ranks."""
    folders = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(folders)
    return Path(folders[0])


def as_launched(rank: int) -> None:
    """The environment that torchrun gives to a process."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD_SIZE), LOCAL_WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="29512")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 1))

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": F.mse_loss(self.net(x), labels)}


def points() -> list[dict[str, Tensor]]:
    torch.manual_seed(1)
    return [{"x": torch.randn(3), "labels": torch.randn(1)} for _ in range(32)]


def lightning(folder: Path, epochs: int, checkpoint: Path | None = None, *, strategy: str, saved_whole: bool = True):
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.plugins.environments import TorchElasticEnvironment
    from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
    from torch.utils.data import DataLoader, TensorDataset

    from interpolate.lightning import AveragingCallback, RegularizerCallback

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net().net
            self.seen: list[dict[str, Tensor]] = []

        def configure_model(self) -> None:
            if strategy == "fsdp2" and not isinstance(self.net[0].weight, DTensor):
                fully_shard(self.net, mesh=self.device_mesh["tensor_parallel"])

        def training_step(self, batch: list[Tensor]) -> Tensor:
            return F.mse_loss(self.net(batch[0]), batch[1])

        def validation_step(self, batch: list[Tensor]) -> None:
            self.seen.append(weights(self))

        test_step = validation_step

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), lr=1e-2)

    class Recorder(Callback):
        def __init__(self) -> None:
            self.theta: list[dict[str, Tensor]] = []

        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_) -> None:
            self.theta.append(weights(pl_module))

    def data() -> DataLoader:
        x = torch.stack([point["x"] for point in points()])[:16]
        return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=4)

    def trainer(*callbacks: Callback) -> Trainer:
        sharded = ModelParallelStrategy(save_distributed_checkpoint=not saved_whole)
        return Trainer(
            accelerator="cpu",
            devices=WORLD_SIZE,
            strategy=sharded if strategy == "fsdp2" else DDPStrategy(),
            plugins=[TorchElasticEnvironment()],
            callbacks=list(callbacks),
            max_epochs=epochs,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )

    model, recorder, averaging, regularizing = Module(), Recorder(), AveragingCallback(), RegularizerCallback()
    callbacks = [averaging, recorder] if strategy == "fsdp2" else [averaging, recorder, regularizing]
    fitting = trainer(*callbacks)
    fitting.fit(model, data(), data(), ckpt_path=checkpoint)
    fitting.save_checkpoint(folder / f"{epochs}.ckpt")
    tested = Module()
    trainer().test(tested, data(), ckpt_path=folder / f"{epochs}.ckpt")
    sharded = any(isinstance(tensor, DTensor) for tensor in averaging.averager.weights.values())
    assert sharded == (strategy == "fsdp2")
    return recorder.theta, model.seen, tested.seen, full(averaging.averager.weights), regularizing.regularizer


def check_lightning(rank: int, **options) -> None:
    as_launched(rank)
    folder = shared_folder()
    theta, seen, tested, average, regularizer = lightning(folder, 4, **options)
    torch.testing.assert_close(average, mean(theta))
    steps = len(theta) // 4
    torch.testing.assert_close(seen[0], mean(theta[:steps]))
    torch.testing.assert_close(tested[-1], mean(theta))
    lightning(folder, 2, **options)
    again, _, retested, resumed, restored = lightning(folder, 4, folder / "2.ckpt", **options)
    assert identical(again[-1], theta[-1])
    assert identical(resumed, average)
    assert identical(retested[-1], tested[-1])
    if regularizer is not None:
        assert restored.alpha == regularizer.alpha
        assert identical(restored.anchor, regularizer.anchor)


def lightning_under_ddp_resumes_bit_for_bit_and_tests_the_average(rank: int) -> None:
    check_lightning(rank, strategy="ddp")


def lightning_under_fsdp2_resumes_bit_for_bit_from_one_file(rank: int) -> None:
    check_lightning(rank, strategy="fsdp2")


def lightning_under_fsdp2_resumes_bit_for_bit_from_shards(rank: int) -> None:
    check_lightning(rank, strategy="fsdp2", saved_whole=False)


test_two_ranks = on_two_ranks(__name__)
