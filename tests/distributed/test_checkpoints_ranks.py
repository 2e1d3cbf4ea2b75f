"""Checkpoints of a training that is spread over processes."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from two_ranks import DEVICE, WORLD_SIZE, on_two_ranks, shared_folder

from applications.openvclip.training.checkpoints import Checkpoints
from interpolate.state import on_first

pytestmark = pytest.mark.slow


def sharded(value: float) -> DTensor:
    mesh = init_device_mesh(DEVICE, (WORLD_SIZE,))
    return distribute_tensor(torch.arange(5.0) + value, mesh, [Shard(0)])  # not the same on both


def each_process_writes_its_own_shard_and_reads_it_again(rank: int) -> None:
    checkpoints = Checkpoints(shared_folder(), keep=1)
    theta = sharded(1)
    for step in (1, 2):
        checkpoints.save(step, {"theta": theta, "whole": torch.full((3,), float(step)), "step": step})
        theta.to_local().add_(1)  # training goes on
    checkpoints.wait()
    assert checkpoints.steps() == [2]
    state = {"theta": sharded(0), "whole": torch.zeros(3), "step": 0}
    assert checkpoints.load(state) == 2
    assert torch.equal(state["theta"].full_tensor(), torch.arange(5.0) + 2)
    assert torch.equal(state["whole"], torch.full((3,), 2.0))
    assert state["step"] == 2


def collectives_of_training_go_on_while_a_checkpoint_is_written(rank: int) -> None:
    checkpoints = Checkpoints(shared_folder(), keep=1)
    for step in range(5):
        checkpoints.save(step, {"w": torch.ones(100_000)})
        for _ in range(20):
            dist.all_reduce(total := torch.ones(1))
            assert total == WORLD_SIZE
    checkpoints.wait()


def what_one_process_can_not_write_is_raised_in_all(rank: int) -> None:
    checkpoints = Checkpoints(folder := shared_folder(), keep=1)
    checkpoints.save(1, {"theta": sharded(1)})
    checkpoints.wait()
    plain = Path.open

    def full(self, mode="r", *args, **kwargs):
        if rank == 1 and "w" in mode:
            raise OSError(28, "No space left on device")
        return plain(self, mode, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "open", full)
        checkpoints.save(2, {"theta": sharded(2)})
        with pytest.raises(OSError, match=r"step 2 was not written: .*No space left on device \(process 1\)"):
            checkpoints.wait()
    dist.barrier()
    assert os.listdir(folder) == ["step-00000001"]
    assert checkpoints.load({"theta": sharded(0)}) == 1


def what_the_first_finds_out_all_know(rank: int) -> None:
    assert on_first(lambda: f"rank {rank}") == "rank 0"
    with pytest.raises(ZeroDivisionError):
        on_first(lambda: 1 / 0)


test_two_ranks = on_two_ranks(__name__)
