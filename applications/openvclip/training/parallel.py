"""One process, or several: as replicas of the model (DDP), or with its weights in shards (FSDP2)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from applications.openvclip import distributed
from interpolate.weights import Weights

M = TypeVar("M", bound=nn.Module)
Parallel = Literal["ddp", "fsdp2"]


def parallelised(model: M, how: Parallel, shard: Callable[[M, DeviceMesh], nn.Module]) -> nn.Module:
    """The model as every process calls it; a single process calls it as it is.

    Both average gradients over the processes. DDP keeps a replica of everything in each; FSDP2 keeps a shard of the
    weights, and so of whatever is made from them afterwards: gradients, optimizer, anchor, average.

    Args:
        model: The same on all processes, on this one's device.
        how: With several processes, how.
        shard: Shares out a model's weights in place.
    """
    if not dist.is_initialized():
        return model
    if how == "ddp":
        return DistributedDataParallel(model)
    return shard(model, init_device_mesh(distributed.device().type, (dist.get_world_size(),)))


def synchronising(model: nn.Module, wanted: bool) -> AbstractContextManager[Any]:
    """Whether backward passes in a `with` block end with the average of gradients over the processes.

    FSDP2 always averages: gradients that wait for the last micro-batch would lie there unsharded.
    """
    return nullcontext() if wanted or not isinstance(model, DistributedDataParallel) else model.no_sync()


def whole(weights: Weights) -> dict[str, Tensor]:
    """Weights out of their shards, on the CPU of every process; all of them call it together."""
    return {
        name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().cpu()
        for name, tensor in weights.items()
    }


def number(tensor: Tensor) -> float:
    """The value of a norm or a sum, whether it is of shards or not."""
    return float(tensor.full_tensor() if isinstance(tensor, DTensor) else tensor)


@torch.no_grad()
def distance(weights: Weights, anchor: Weights) -> float:
    """`||theta - anchor||`, whether they are in shards or not; all processes call it together."""
    squares = [(p - anchor[name]).float().square().sum() for name, p in weights.items()]
    return sum(map(number, squares)) ** 0.5
