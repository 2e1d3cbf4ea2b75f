import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_modules import identical, modules, moved, snapshot
from torch import nn

from interpolate import SWAAverager, WeightMismatchError, patch
from interpolate.weights import trainable_weights


def averaged(model: nn.Module, trajectory: list[nn.Module]) -> SWAAverager:
    """An averager that has seen the model at every point of a trajectory."""
    averager = SWAAverager(model)
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


@given(modules(), st.integers(0, 4))
def test_a_resumed_average_equals_one_never_interrupted(model: nn.Module, interrupted: int):
    trajectory = [moved(model) for _ in range(4)]
    uninterrupted = averaged(model, trajectory)
    state = averaged(model, trajectory[:interrupted]).state_dict()
    resumed = SWAAverager(model)
    resumed.load_state_dict(state)
    for point in trajectory[interrupted:]:
        model.load_state_dict(point.state_dict())
        resumed.update()
    assert identical(resumed.weights, uninterrupted.weights)
    assert (resumed.n_averaged, resumed.step) == (4, 4)


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
