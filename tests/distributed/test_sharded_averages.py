import tempfile
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from two_ranks import WORLD_SIZE, on_two_ranks

from interpolate import (
    EMAAverager,
    LAWAAverager,
    SWAAverager,
    WeightAverager,
    WeightMismatchError,
    patch,
    reestimate_batchnorm,
    slerp,
)

FAMILY = [SWAAverager, partial(EMAAverager, decay=0.7), partial(LAWAAverager, k=2)]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 1)).double()


def sharded() -> nn.Module:
    return fully_shard(network(), mesh=init_device_mesh("cpu", (WORLD_SIZE,)))


def train(model: nn.Module, averager: WeightAverager, steps: int) -> None:
    """A trajectory that is the same however the weights are sharded."""
    for _ in range(steps):
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(0.9).add_(0.1)
        averager.update()


def full(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in tensors.items()}


def check_average(averager: WeightAverager, kind, steps: int) -> None:
    model = network()
    expected = kind(model)
    train(model, expected, steps)
    torch.testing.assert_close(full(averager.weights), expected.weights, rtol=0, atol=0)
    assert (averager.step, averager.n_averaged) == (steps, steps)


def sharded_averages_equal_whole_ones_without_communication(rank: int) -> None:
    for kind in FAMILY:
        model = sharded()
        averager = kind(model)
        with CommDebugMode() as communication:
            train(model, averager, 3)
        assert communication.get_total_counts() == 0
        for name, p in model.named_parameters():
            assert averager.weights[name].placements == p.placements
        check_average(averager, kind, 3)


def averages_are_applied_to_shards_and_undone(rank: int) -> None:
    model = sharded()
    averager, x = SWAAverager(model), torch.randn(4, 5).double()
    train(model, averager, 2)
    model.eval()
    with torch.no_grad():
        own = model(x)
        with averager.applied():
            average = network().eval()
            average.load_state_dict(full(averager.weights), strict=False)
            torch.testing.assert_close(model(x), average(x))
        torch.testing.assert_close(model(x), own, rtol=0, atol=0)


def an_average_kept_on_the_cpu_stays_sharded(rank: int) -> None:
    model = sharded()
    averager = SWAAverager(model, device="cpu")
    train(model, averager, 2)
    check_average(averager, SWAAverager, 2)
    assert all(isinstance(t, DTensor) for t in averager.weights.values())


def saved_on_two_ranks_it_resumes_on_one_and_back(rank: int) -> None:
    for kind in FAMILY:
        folders: list = [tempfile.mkdtemp(), tempfile.mkdtemp()] if rank == 0 else [None, None]
        dist.broadcast_object_list(folders)
        model = sharded()
        averager = kind(model)
        train(model, averager, 2)
        dcp.save({"averager": averager.state_dict(), "model": model.state_dict()}, checkpoint_id=folders[0])

        if rank == 0:  # a process alone, with whole tensors
            alone = network()
            on_one = kind(alone)
            resume(alone, on_one, folders[0], no_dist=True)
            train(alone, on_one, 1)
            check_average(on_one, kind, 3)
            state = {"averager": on_one.state_dict(), "model": alone.state_dict()}
            dcp.save(state, checkpoint_id=folders[1], no_dist=True)
        dist.barrier()

        model = sharded()
        averager = kind(model)
        resume(model, averager, folders[1])
        train(model, averager, 1)
        check_average(averager, kind, 4)


def resume(model: nn.Module, averager: WeightAverager, folder: str, **options) -> None:
    state = {"averager": averager.state_dict(), "model": model.state_dict()}
    dcp.load(state, checkpoint_id=folder, **options)
    averager.load_state_dict(state["averager"])
    model.load_state_dict(state["model"])


def batch_norm_statistics_are_those_of_all_ranks(rank: int) -> None:
    torch.manual_seed(1)
    x = torch.randn(12, 5).double()
    model = network()
    reestimate_batchnorm(model, [[x[:4], x[4:9]], [x[9:]]][rank])
    torch.testing.assert_close(model[1].running_var, model[0](x).detach().var(0))


def shards_are_patched_as_shards(rank: int) -> None:
    model = sharded()
    averager = SWAAverager(model)
    anchor = {n: p.detach().clone() for n, p in model.named_parameters()}
    train(model, averager, 2)
    patched = patch(anchor, averager.weights, anchor_weight=0.25)
    expected = patch(full(anchor), full(averager.weights), anchor_weight=0.25)
    torch.testing.assert_close(full(patched), expected, rtol=0, atol=0)
    assert all(patched[n].placements == p.placements for n, p in model.named_parameters())


def unevenly_sharded_weights_are_mixed_along_the_arc_of_the_whole(rank: int) -> None:
    model = sharded()  # 7 rows, and 1, on 2 ranks
    anchor = {n: p.detach().clone() for n, p in model.named_parameters()}
    theta = {n: p + p.cos() for n, p in anchor.items()}
    mixed = slerp(anchor, theta, anchor_weight=0.3)
    assert all(mixed[n].placements == p.placements for n, p in anchor.items())
    torch.testing.assert_close(full(mixed), slerp(full(anchor), full(theta), anchor_weight=0.3))


def long_averages_of_shards_are_within_a_last_bit(rank: int) -> None:
    for device in (None, "cpu"):
        for dtype in (torch.float32, torch.bfloat16):
            model = fully_shard(network().to(dtype), mesh=init_device_mesh("cpu", (WORLD_SIZE,)))
            averager = SWAAverager(model, device=device)
            for value, n in ((1.0, 100), (1.0078125, 900)):  # both are bf16
                with torch.no_grad():
                    for p in model.parameters():
                        p.fill_(value)
                for _ in range(n):
                    averager.update()
            for average in full(averager.weights).values():
                assert average.dtype is torch.float32
                torch.testing.assert_close(average, torch.full_like(average, 1 + 0.9 / 128), rtol=2**-23, atol=0)


def a_model_sharded_after_its_averager_is_refused(rank: int) -> None:
    model = network()
    averager = SWAAverager(model)
    fully_shard(model, mesh=init_device_mesh("cpu", (WORLD_SIZE,)))
    with pytest.raises(WeightMismatchError, match=r"0\.weight is sharded as .* Make the averager after fully_shard"):
        averager.update()


test_two_ranks = on_two_ranks(__name__)
