"""Runs many claims on two processes that are started once: on the CPU with gloo, or on two GPUs with NCCL.

`INTERPOLATE_TEST_DEVICE=cuda` asks for the latter; whatever a claim makes is then on its rank's GPU.
"""

import inspect
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

WORLD_SIZE = 2
DEVICE = os.environ.get("INTERPOLATE_TEST_DEVICE", "cpu")
"""The kind of device, as meshes want it."""

Claim = Callable[[int], None]


def claims_of(module: str) -> list[Claim]:
    """The functions of a test module that take a rank and nothing else."""
    functions = inspect.getmembers(sys.modules[module], inspect.isfunction)
    return [f for _, f in functions if f.__module__ == module and list(inspect.signature(f).parameters) == ["rank"]]


def on_two_ranks(module: str) -> Callable[[str, dict[str, str]], None]:
    """The test of a module's claims; to be called when all of them are defined."""

    @pytest.mark.parametrize("claim", [claim.__name__ for claim in claims_of(module)])
    def test_two_ranks(claim: str, found: dict[str, str]) -> None:
        assert not found[claim], found[claim]

    return test_two_ranks


def outcomes(claims: list[Claim], folder: Path) -> dict[str, str]:
    """Name of a claim → tracebacks of the ranks on which it did not hold, empty where it did.

    Claims after one that did not hold are not run: the ranks may no longer agree about the next collective.
    """
    for claim in claims:
        (folder / claim.__name__).write_text("")
    mp.spawn(_rank, (claims, str(folder)), nprocs=WORLD_SIZE)
    return {claim.__name__: (folder / claim.__name__).read_text() for claim in claims}


def shared_folder() -> Path:
    """One folder for both ranks."""
    folders = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(folders)
    return Path(folders[0])


def _rank(rank: int, claims: list[Claim], folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = dist.FileStore(f"{folder}/store", WORLD_SIZE)
    if DEVICE == "cuda":
        torch.cuda.set_device(rank)
        torch.set_default_device(torch.device("cuda", rank))
    backend = "cpu:gloo,cuda:nccl" if DEVICE == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=WORLD_SIZE, timeout=timedelta(seconds=60))
    failed = None
    for claim in claims:
        torch.manual_seed(0)
        try:
            if failed is None:
                claim(rank)
            message = f"rank {rank}: not run, because {failed} did not hold\n" if failed else ""
        except Exception:  # noqa: BLE001 # whatever went wrong is reported to the test
            failed, message = claim.__name__, f"rank {rank}: {traceback.format_exc()}\n"
        with open(f"{folder}/{claim.__name__}", "a") as file:
            file.write(message)
    if failed is None:
        dist.barrier()
    dist.destroy_process_group()
