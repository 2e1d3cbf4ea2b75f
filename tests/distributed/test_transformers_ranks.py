"""The trainer of Hugging Face on two ranks, with DDP and with weights sharded by FSDP2."""

import os
from pathlib import Path

import pytest
import torch
from random_modules import identical
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from two_ranks import WORLD_SIZE, on_two_ranks, shared_folder

from interpolate import InterpolatedWeightRegularizer, SWAAverager
from interpolate._names import unwrapped

pytestmark = pytest.mark.slow

F = nn.functional


def full(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone() for n, t in tensors.items()}


def weights(model: nn.Module) -> dict[str, Tensor]:
    return full(dict(unwrapped(model).named_parameters()))


def mean(snapshots: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {n: torch.stack([snapshot[n] for snapshot in snapshots]).mean(0) for n in snapshots[0]}


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


def hugging_face(folder: Path, steps: int, resume: Path | None = None, *, fsdp2: bool = False, **options):
    from accelerate import PartialState
    from accelerate.state import AcceleratorState, DistributedType
    from transformers import TrainerCallback, TrainingArguments

    from interpolate.transformers import InterpolatedTrainer

    class Recorder(TrainerCallback):
        def __init__(self) -> None:
            self.theta: list[dict[str, Tensor]] = []
            self.evaluated: list[dict[str, Tensor]] = []

        def on_step_end(self, args, state, control, model=None, **kwargs):
            self.theta.append(weights(model))

        def on_prediction_step(self, args, state, control, model=None, **kwargs):
            self.evaluated.append(weights(model))

    AcceleratorState._reset_state(reset_partial_state=True)
    sharded = {"fsdp": "full_shard", "fsdp_config": {"version": 2, "state_dict_type": "SHARDED_STATE_DICT"}}
    settings = {
        "output_dir": str(folder),
        "max_steps": steps,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "steps",
        "save_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "disable_tqdm": True,
        "logging_strategy": "no",
        "max_grad_norm": 0.0,
        **(sharded if fsdp2 else {}),
        **options,
    }
    arguments = TrainingArguments(**settings)
    assert arguments.world_size == WORLD_SIZE
    if fsdp2:  # accelerate shards on accelerators only; all that it then does works on the CPU too
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    trainer = InterpolatedTrainer(
        model=Net(),
        regularizer=InterpolatedWeightRegularizer,
        averager=SWAAverager,
        args=arguments,
        train_dataset=points(),
        eval_dataset=points()[:4],
        callbacks=[recorder := Recorder()],
    )
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    assert any(isinstance(tensor, DTensor) for tensor in trainer.averager.weights.values()) == fsdp2
    return trainer, recorder


def check_hugging_face(rank: int, **options) -> None:
    as_launched(rank)
    folder = shared_folder()
    whole, kept = hugging_face(folder / "whole", 4, **options)
    for evaluated, steps in zip(kept.evaluated[:: len(kept.evaluated) // 2], (2, 4), strict=True):
        torch.testing.assert_close(evaluated, mean(kept.theta[:steps]))
    torch.testing.assert_close(weights(whole.model), mean(kept.theta))
    hugging_face(folder / "parts", 2, **options)
    resumed, rest = hugging_face(folder / "other", 4, resume=folder / "parts" / "checkpoint-2", **options)
    assert identical(rest.theta[-1], kept.theta[-1])
    assert identical(weights(resumed.model), weights(whole.model))
    assert identical(full(resumed.averager.weights), full(whole.averager.weights))
    assert identical(full(resumed.regularizer.anchor), weights(Net()))
    assert resumed.regularizer.alpha == whole.regularizer.alpha


def hugging_face_under_ddp_resumes_bit_for_bit_and_evaluates_the_average(rank: int) -> None:
    check_hugging_face(rank)


def hugging_face_under_ddp_accumulates_gradients(rank: int) -> None:
    check_hugging_face(rank, gradient_accumulation_steps=2)


def hugging_face_under_fsdp2_resumes_bit_for_bit_and_evaluates_the_average(rank: int) -> None:
    check_hugging_face(rank, fsdp2=True)


test_two_ranks = on_two_ranks(__name__)
