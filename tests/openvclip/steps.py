"""A small network and its training, in one process or as one of several: what the tests of the trainer share."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from applications.openvclip import distributed
from applications.openvclip.data.loader import MicroBatch, TrainingOrder
from applications.openvclip.model.precision import Precision
from applications.openvclip.training.l2_penalty import L2Penalty
from applications.openvclip.training.optimisation import LearningRate, adamw
from applications.openvclip.training.parallel import Parallel, parallelised, whole
from applications.openvclip.training.step import Step
from applications.openvclip.training.teacher import Teacher
from interpolate import InterpolatedWeightRegularizer, SWAAverager
from interpolate.weights import trainable_weights

VIDEOS, CLASSES = 20, 3


class Scorer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.Sequential(nn.Flatten(), nn.LazyLinear(6), nn.Tanh(), nn.Linear(6, 4))
        self.tower(torch.zeros(1, 3, 2, 2, 2))

    def forward(self, clips: Tensor, class_embeddings: Tensor) -> Tensor:
        return self.tower(clips) @ class_embeddings.T


def shard(model: Scorer, mesh: DeviceMesh) -> nn.Module:
    for layer in (model.tower[1], model.tower[3]):
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


@dataclass(frozen=True)
class Plan:
    """What the tests vary."""

    steps: int = 8
    batch_size: int = 8
    micro_batch: int = 2
    clips_at_once: int = 2
    alpha_per: Any = "micro-batch"
    parallel: Parallel = "ddp"
    penalty: bool = False
    taught: bool = False
    learning_rate: float = 0.1
    precision: Any = "fp32"


def small_step(plan: Plan) -> Step:
    torch.manual_seed(0)
    encoder = Scorer()
    model = parallelised(encoder, plan.parallel, shard)
    last = plan.steps
    return Step(
        encoder,
        model,
        class_embeddings=torch.eye(4)[:CLASSES],
        optimizer=adamw(encoder, weight_decay=0.01, betas=(0.9, 0.98)),
        learning_rate=LearningRate(plan.learning_rate, 0.0, warmup_steps=2, total_steps=last, schedule="cosine"),
        regularizer=L2Penalty(model, 0.7) if plan.penalty else InterpolatedWeightRegularizer(model, seed=5),
        averager=SWAAverager(encoder, start_step=3, cycle_steps=2),
        max_gradient_norm=1.0,
        order=TrainingOrder(
            VIDEOS, plan.batch_size, plan.micro_batch, 0, 0, last, distributed.rank(), distributed.world_size()
        ),
        alpha_per=plan.alpha_per,
        clips_at_once=plan.clips_at_once,
        precision=Precision(plan.precision, torch.device("cpu")),
        teacher=Teacher(encoder, weight=0.5, decay=0.9) if plan.taught else None,
    )


def small_batches(order: TrainingOrder, first_step: int = 0, seen: list | None = None) -> Iterator[MicroBatch]:
    """Micro-batches of an order from a step on; a clip is a function of its epoch and its video."""
    for keys in replace(order, first_step=first_step):
        clips = [
            torch.randn(3, 2, 2, 2, generator=torch.Generator().manual_seed(1000 * epoch + i)) for epoch, i in keys
        ]
        if seen is not None:
            seen += keys
        yield MicroBatch(
            torch.stack(clips), torch.tensor([i % CLASSES for _, i in keys]), tuple(f"{i}.mp4" for _, i in keys)
        )


def trained(plan: Plan) -> dict[str, Any]:
    """What becomes of a plan: losses, weights, their average, and which videos this process has seen."""
    step, seen, losses = small_step(plan), [], []
    batches = small_batches(step.order, seen=seen)
    for _ in range(plan.steps):
        losses.append(step(batches)[0])
    return {
        "values": [{name: value for name, value in of_step.items() if name != "waited_s"} for of_step in losses],
        "weights": whole(trainable_weights(step.encoder)),
        "average": whole(step.averager.weights),
        "seen": seen,
    }


def on_processes(n: int, function: Callable[..., Any], *arguments: Any, folder: Path) -> list[Any]:
    """What a function of a module returns on each of n gloo processes."""
    folder.mkdir(parents=True, exist_ok=True)
    multiprocessing.get_context("forkserver").set_forkserver_preload([__name__])  # torch is imported once for all
    mp.start_processes(_process, (n, function, arguments, str(folder)), nprocs=n, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(n)]


def _process(rank: int, n: int, function: Callable[..., Any], arguments: tuple, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = dist.FileStore(f"{folder}/store", n)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=n, timeout=timedelta(seconds=60))
    torch.save(function(*arguments), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def distance_as_seen(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """How far weights of encoders are apart, without the biases of attention's keys: softmax does not see them, so that
    their gradients are rounding errors, which AdamW makes steps of."""
    squares = 0.0
    for name in b:
        difference = (a[name] - b[name]).double()
        if name.endswith("attn.in_proj_bias"):
            width = len(difference) // 3
            difference[width : 2 * width] = 0
        squares += difference.square().sum().item()
    return squares**0.5
