import itertools
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_modules import identical, modules, moved, snapshot
from torch import nn

from interpolate import EMAAverager, LAWAAverager, SWAAverager, WeightAverager, WeightMismatchError, patch
from interpolate.weights import trainable_weights

FAMILY = [SWAAverager, partial(EMAAverager, decay=0.7), partial(LAWAAverager, k=2)]


def averaged(
    model: nn.Module, trajectory: list[nn.Module], kind: Callable[..., WeightAverager] = SWAAverager
) -> WeightAverager:
    """An averager that has seen the model at every point of a trajectory."""
    averager = kind(model)
    for point in trajectory:
        model.load_state_dict(point.state_dict())
        averager.update()
    return averager


def close(a: dict, b: dict) -> None:
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)  # float64 weights; the order of additions differs


@given(modules(), st.integers(1, 5))
def test_the_average_is_the_mean_of_the_snapshots(model: nn.Module, n: int):
    trajectory = [moved(model) for _ in range(n)]
    mean = averaged(model, trajectory).weights
    assert list(mean) == list(trainable_weights(model))
    close(mean, {k: torch.stack([dict(p.named_parameters())[k].detach() for p in trajectory]).mean(0) for k in mean})


@given(modules(), st.floats(0, 1))
def test_averaging_and_interpolating_commute(model: nn.Module, anchor_weight: float):
    anchor = {n: p.detach().clone() for n, p in trainable_weights(model).items()}
    trajectory = [moved(model) for _ in range(3)]
    patched_mean = patch(anchor, averaged(model, trajectory).weights, anchor_weight=anchor_weight)
    patched = [patch(anchor, trainable_weights(p), anchor_weight=anchor_weight) for p in trajectory]
    for point, weights in zip(trajectory, patched, strict=True):
        point.load_state_dict(weights, strict=False)
    close(averaged(model, trajectory).weights, patched_mean)


@given(modules())
def test_the_order_of_snapshots_does_not_matter(model: nn.Module):
    trajectory = [moved(model) for _ in range(3)]
    means = [averaged(model, list(order)).weights for order in itertools.permutations(trajectory)]
    for mean in means:
        close(mean, means[0])


@given(modules(), st.integers(0, 4), st.sampled_from(FAMILY))
def test_a_resumed_average_equals_one_never_interrupted(model: nn.Module, interrupted: int, kind):
    trajectory = [moved(model) for _ in range(4)]
    uninterrupted = averaged(model, trajectory, kind)
    state = averaged(model, trajectory[:interrupted], kind).state_dict()
    resumed = kind(model)
    resumed.load_state_dict(state)
    for point in trajectory[interrupted:]:
        model.load_state_dict(point.state_dict())
        resumed.update()
    assert identical(resumed.weights, uninterrupted.weights)
    assert (resumed.n_averaged, resumed.step) == (4, 4)


def named_weights(points: list[nn.Module], name: str) -> list[torch.Tensor]:
    return [dict(p.named_parameters())[name].detach() for p in points]


@given(modules(), st.integers(1, 6), st.integers(1, 4))
def test_lawa_is_the_mean_of_the_latest_snapshots(model: nn.Module, n: int, k: int):
    trajectory = [moved(model) for _ in range(n)]
    mean = averaged(model, trajectory, partial(LAWAAverager, k=k)).weights
    close(mean, {name: torch.stack(named_weights(trajectory[-k:], name)).mean(0) for name in mean})


@given(modules(), st.integers(1, 15), st.floats(0, 0.99), st.booleans())
def test_ema_follows_its_recurrence(model: nn.Module, n: int, decay: float, warmup: bool):
    trajectory = [moved(model) for _ in range(n)]
    average = averaged(model, trajectory, partial(EMAAverager, decay=decay, warmup=warmup)).weights
    for name, tensor in average.items():
        first, *rest = named_weights(trajectory, name)
        expected = first
        for i, theta in enumerate(rest, start=1):
            d = min(decay, (1 + i) / (10 + i)) if warmup else decay
            expected = d * expected + (1 - d) * theta
        torch.testing.assert_close(tensor, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", FAMILY)
def test_buffers_are_copied_and_never_averaged(kind):
    model = nn.BatchNorm1d(2)
    model.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
    averager = kind(model)
    for _ in range(3):
        model(torch.randn(8, 2))
        averager.update()
        at_snapshot = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model(torch.randn(8, 2))
    assert identical(averager.buffers, at_snapshot)
    own = snapshot(model)
    with averager.applied():
        assert identical(dict(model.named_buffers()), at_snapshot)
        model(torch.randn(8, 2))
    assert identical(snapshot(model), own)


def test_batch_norm_statistics_of_the_average_are_kept_with_it():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.BatchNorm1d(2))
    averager, own, x = SWAAverager(model), snapshot(model), torch.randn(16, 2)
    averager.update()
    averager.reestimate_batchnorm([x])
    torch.testing.assert_close(averager.buffers["1.running_mean"], model[0](x).mean(0).detach())
    assert identical(snapshot(model), own)


def test_the_average_is_kept_where_it_is_told():
    averager = SWAAverager(nn.Linear(1, 1), device="meta")  # any device that is not the model's
    averager.update()
    assert averager.weights["weight"].device.type == "meta"
    assert averager.model.weight.device.type == "cpu"


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (partial(EMAAverager, decay=1.0), r"decay must be in \[0, 1\), got 1\.0"),
        (partial(EMAAverager, decay=float("nan")), r"decay must be in \[0, 1\), got nan"),
        (partial(LAWAAverager, k=0), "k must be at least 1, got 0"),
    ],
)
def test_arguments_outside_their_range_are_refused(kind, message: str):
    with pytest.raises(ValueError, match=message):
        kind(nn.Linear(1, 1))


def test_the_state_of_another_kind_of_average_is_refused():
    model = nn.Linear(1, 1)
    with pytest.raises(ValueError, match="the state holds 2 sets of weights, this averager 1"):
        SWAAverager(model).load_state_dict(LAWAAverager(model, k=2).state_dict())


def test_snapshots_are_taken_every_cycle_after_the_start():
    model = nn.Linear(1, 1)
    averager = SWAAverager(model, start_step=4, cycle_steps=3)
    counts = []
    for _ in range(11):
        averager.update()
        counts.append(averager.n_averaged)
    assert counts == [0, 0, 0, 0, 0, 0, 1, 1, 1, 2, 2]


def test_half_precision_weights_are_averaged_in_float32():
    model = nn.Linear(1, 1, bias=False).bfloat16()
    averager = SWAAverager(model)
    for i in range(1000):
        nn.init.constant_(model.weight, 1 + i % 2)
        averager.update()
    assert averager.weights["weight"].dtype is torch.float32
    torch.testing.assert_close(averager.weights["weight"], torch.tensor([[1.5]]), rtol=1e-5, atol=0)


def test_the_model_is_never_modified():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    own = snapshot(model)
    SWAAverager(model).update()
    assert identical(snapshot(model), own)


def test_the_model_can_be_evaluated_at_the_average():
    model = nn.Linear(1, 1, bias=False)
    averager = SWAAverager(model)
    for value in (1.0, 2.0):
        nn.init.constant_(model.weight, value)
        averager.update()
    with averager.applied() as average:
        assert average(torch.ones(1)).item() == 1.5
    assert model.weight.item() == 2.0


def test_an_average_of_nothing_is_refused_with_the_schedule():
    averager = SWAAverager(nn.Linear(1, 1), start_step=5, cycle_steps=2)
    averager.update()
    with pytest.raises(RuntimeError, match=r"update\(\) was called 1 times, and the first snapshot is due at call 7"):
        _ = averager.weights


@pytest.mark.parametrize(("argument", "value"), [("start_step", -1), ("cycle_steps", 0)])
def test_a_schedule_outside_its_range_is_refused(argument: str, value: int):
    with pytest.raises(ValueError, match=f"{argument} must .* got {value}"):
        SWAAverager(nn.Linear(1, 1), **{argument: value})


def test_weights_frozen_on_the_way_are_named():
    model = nn.Linear(1, 1)
    averager = SWAAverager(model)
    model.bias.requires_grad_(False)
    with pytest.raises(WeightMismatchError, match=r"1 of 2 weights unexpected \(bias\)"):
        averager.update()


def test_the_state_of_another_model_is_refused():
    averager = SWAAverager(nn.Linear(1, 1))
    averager.update()
    with pytest.raises(WeightMismatchError, match=r"weight: theta \(2, 2\), anchor \(1, 1\)"):
        SWAAverager(nn.Linear(2, 2)).load_state_dict(averager.state_dict())
