"""One process or many: who this one is, and what all of them do together."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from interpolate.state import on_first

T = TypeVar("T")


def initialise() -> None:
    """Join the other processes, if torchrun has started this one.

    Raises:
        ValueError: Slurm has started several, which do not know of each other: each would do all of the work.
    """
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
    if tasks > 1 and "WORLD_SIZE" not in os.environ:
        raise ValueError(f"srun has started {tasks} processes without torchrun; start one torchrun on each node.")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        joined: dict[str, Any] = {}
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            # torchrun's own outlives its processes: those that it restarts must not find the addresses of the former
            place = {"rank": int(os.environ["RANK"]), "world_size": int(os.environ["WORLD_SIZE"])}
            joined = {"store": store("processes", timedelta(minutes=5)), **place}
        dist.init_process_group(backend, timeout=timedelta(days=1), **joined)  # shares of videos take unequal time


def store(purpose: str, timeout: timedelta) -> dist.Store:
    """A new connection to the store that torchrun keeps for its processes; what is in it is this attempt's, and of this
    purpose."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    shared = dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timeout)
    return dist.PrefixStore(f"{purpose}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", shared)


def finish() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def device() -> torch.device:
    """The GPU of this process, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def here(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors on the device of this process."""
    where = device()
    return {name: tensor.to(where) for name, tensor in tensors.items()}


def summed(values: list[float]) -> list[float]:
    """The sums of numbers over all processes."""
    if not dist.is_initialized():
        return values
    total = torch.tensor(values, dtype=torch.float64, device=device())
    dist.all_reduce(total)
    return total.tolist()


def gathered(value: T) -> list[T]:
    """The values of all processes, by rank."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def first_alone_first(function: Callable[[], T]) -> T:
    """Call a function on the first process, then on all others, which find what it has left on the disk."""
    found: list[T] = []
    on_first(lambda: found.append(function()))
    return found[0] if found else function()


def from_first(compute: Callable[[], Tensor]) -> Tensor:
    """A tensor that the first process computes, on the device of every process."""
    if not dist.is_initialized():
        return compute().to(device())
    found: list[Tensor] = []
    shape, dtype = on_first(lambda: (found.append(compute()), (found[0].shape, found[0].dtype))[1])
    tensor = found[0].to(device()) if found else torch.empty(shape, dtype=dtype, device=device())
    dist.broadcast(tensor, src=0)
    return tensor


def check_alike(facts: Mapping[str, object]) -> None:
    """Refuse to go on with processes that differ in what should be the same on all of them.

    Raises:
        ValueError: On every process alike; names the facts, the ranks and what they have.
    """
    all_facts = gathered(dict(facts))
    texts = []
    for name in facts:
        ranks: dict[str, list[int]] = {}
        for i, theirs in enumerate(all_facts):
            ranks.setdefault(str(theirs.get(name)), []).append(i)
        if len(ranks) > 1:
            found = ", ".join(f"{value[:60]} on rank {', '.join(map(str, where))}" for value, where in ranks.items())
            texts.append(f"{name}: {found}")
    if texts:
        raise ValueError(f"processes that train together must be alike, and differ in {'; '.join(texts)}.")
