import copy
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
from torch.nn.parallel import DistributedDataParallel
from two_ranks import DEVICE, WORLD_SIZE, on_two_ranks

from interpolate import (
    EMAAverager,
    InterpolatedWeightRegularizer,
    LAWAAverager,
    SWAAverager,
    WeightAverager,
    WeightMismatchError,
    load_weights,
    patch,
    reestimate_batchnorm,
    slerp,
)
from interpolate.weights import trainable_weights

FAMILY = [SWAAverager, partial(EMAAverager, decay=0.7), partial(LAWAAverager, k=2)]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 1)).double()


def sharded() -> nn.Module:
    return fully_shard(network(), mesh=init_device_mesh(DEVICE, (WORLD_SIZE,)))


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
            model = fully_shard(network().to(dtype), mesh=init_device_mesh(DEVICE, (WORLD_SIZE,)))
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


def train_with_teacher(model: nn.Module, x: Tensor, teacher, first: bool) -> dict[str, Tensor]:
    """The gradients of a step towards a teacher, asked before the student's forward pass or after it."""
    target = teacher(x) if first else None
    output = model(x)
    target = teacher(x) if target is None else target
    assert not target.requires_grad
    (output - target).square().mean().backward()
    found = full({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    model.zero_grad()
    return found


def a_sharded_teacher_is_that_of_an_explicit_copy_and_leaves_no_trace(rank: int) -> None:
    x = torch.randn(4, 5).double()  # the same on both ranks: the mean of the gradients is that of either
    for options in ({}, {"reshard_after_forward": False}):
        model = fully_shard(network(), mesh=init_device_mesh(DEVICE, (WORLD_SIZE,)), **options)
        averager = SWAAverager(model, start_at="anchor")
        regularizer = InterpolatedWeightRegularizer(model)
        train(model, averager, 2)
        buffers = {n: b.clone() for n, b in model.named_buffers()}
        theta = {n: t.clone() for n, t in full(dict(model.named_parameters())).items()}
        for weights, teacher in ((averager.weights, averager), (regularizer.anchor, regularizer.at_anchor)):
            student, copied = network(), network().requires_grad_(False)
            load_weights(student, theta)
            load_weights(copied, {**full(weights), **averager.buffers})
            for first in (True, False):
                expected = train_with_teacher(student, x, copied, first)
                found = train_with_teacher(model, x, teacher, first)
                torch.testing.assert_close(found, expected)
                torch.testing.assert_close(full(dict(model.named_parameters())), theta, rtol=0, atol=0)
            load_weights(model, buffers)


def a_teacher_may_be_asked_within_the_loss_on_shards(rank: int) -> None:
    x, anchor = torch.randn(4, 5).double(), {n: p.cos() for n, p in network().named_parameters()}
    found = []
    for build in (sharded, network):
        model = build()
        averager = SWAAverager(model, start_at="anchor")
        train(model, averager, 2)
        regularizer = InterpolatedWeightRegularizer(model, anchor=anchor, alpha_per_rank=False)
        loss = regularizer.backward(lambda model, a=averager: (model(x) - a(x)).square().mean())
        found.append((loss, full({n: p.grad for n, p in model.named_parameters()})))
    torch.testing.assert_close(*found)


def collectives_of(call) -> int:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    return sum(event.count for event in profile.key_averages() if event.key.startswith("gloo:"))


def check_teacher_under_ddp(ddp: nn.Module, x: Tensor) -> None:
    averager = SWAAverager(ddp, start_at="anchor")
    train(ddp, averager, 2)
    regularizer = InterpolatedWeightRegularizer(ddp, anchor=trainable_weights(network()))
    copied, frozen = network().requires_grad_(False), copy.deepcopy(ddp.module).requires_grad_(False)
    load_weights(copied, {**averager.weights, **averager.buffers})
    load_weights(frozen, regularizer.anchor)
    for first in (True, False):
        buffers = {n: b.clone() for n, b in ddp.module.named_buffers()}
        expected = train_with_teacher(ddp, x, lambda x: copied(x) + frozen(x), first)
        load_weights(ddp, buffers)
        found = train_with_teacher(ddp, x, lambda x: averager(x) + regularizer.at_anchor(x), first)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        both: list = [None, None]
        dist.all_gather_object(both, found)
        torch.testing.assert_close(both[0], both[1], rtol=0, atol=0)
    assert collectives_of(lambda: averager(x)) == 0


def a_teacher_under_ddp_communicates_nothing_and_is_that_of_a_copy(rank: int) -> None:
    torch.manual_seed(rank)
    x = torch.randn(4, 5).double()
    for options in ({}, {"static_graph": True}, {"find_unused_parameters": True}):
        check_teacher_under_ddp(DistributedDataParallel(network(), **options), x)


def a_model_sharded_after_its_averager_is_refused(rank: int) -> None:
    model = network()
    averager = SWAAverager(model)
    fully_shard(model, mesh=init_device_mesh(DEVICE, (WORLD_SIZE,)))
    with pytest.raises(WeightMismatchError, match=r"0\.weight is sharded as .* Make the averager after fully_shard"):
        averager.update()


test_two_ranks = on_two_ranks(__name__)
