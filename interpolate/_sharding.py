"""What DDP and sharding do to a module and its tensors: FSDP2 and other DTensors."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def inner(model: nn.Module) -> nn.Module:
    """The module inside `DistributedDataParallel`, whose forward pass communicates nothing; else the model itself."""
    compiled = getattr(model, "_orig_mod", model)
    return compiled.module if isinstance(compiled, DistributedDataParallel) else model


def is_sharded(tensor: Tensor) -> bool:
    """Whether this is a DTensor, as FSDP2 and tensor parallelism make them."""
    return hasattr(tensor, "device_mesh")


def reshard(model: nn.Module) -> None:
    """Let FSDP2 forget the whole parameters that it has gathered: only the shards are what an optimizer changes."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return  # nobody has imported it, so that nothing is sharded by it
    for module in model.modules():
        if isinstance(module, fsdp.FSDPModule):
            module.reshard()  # pyright: ignore[reportCallIssue]


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a DTensor, else the tensor itself: the same memory, detached."""
    sharded: Any = tensor.detach()
    return sharded.to_local() if is_sharded(tensor) else sharded


@torch.no_grad()
def like(tensor: Tensor, reference: Tensor) -> Tensor:
    """A tensor in the dtype, on the device and in the shards of another; itself if it is so already."""
    sharded: Any = tensor
    target: Any = reference
    if is_sharded(target) and not is_sharded(tensor):
        from torch.distributed.tensor import distribute_tensor  # imported by whoever made the reference

        sharded = distribute_tensor(tensor.to(target.device), target.device_mesh, target.placements)
    elif is_sharded(target) and sharded.placements != target.placements:
        sharded = sharded.redistribute(target.device_mesh, target.placements)
    elif is_sharded(tensor) and not is_sharded(target):
        sharded = sharded.full_tensor()
    return sharded.to(device=reference.device, dtype=reference.dtype)
