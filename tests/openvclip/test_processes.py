"""The trajectory of training is that of its plan, on however many processes, and however they share the weights."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.openvclip.steps import VIDEOS, Plan, Scorer, on_processes, trained

PLAN = Plan(steps=50)


def assert_same(found: dict, expected: dict) -> None:
    """Losses to 1e-5, weights and their average to 1e-5 of the distance moved."""
    for values, wanted in zip(found["values"], expected["values"], strict=True):
        assert values == pytest.approx(wanted, rel=1e-5)
    torch.manual_seed(0)
    beginning = dict(Scorer().named_parameters())
    for kind in ("weights", "average"):
        moved = distance(expected[kind], {name: beginning[name].detach() for name in expected[kind]})
        assert moved > 0.1
        assert distance(found[kind], expected[kind]) < 1e-5 * moved


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return sum((a[name] - b[name]).double().square().sum().item() for name in b) ** 0.5


ONE_ALPHA = replace(PLAN, alpha_per="step")
PLANS = [
    PLAN,
    replace(PLAN, penalty=True, taught=True),
    replace(ONE_ALPHA, taught=True),
    replace(ONE_ALPHA, parallel="fsdp2", taught=True),
    replace(ONE_ALPHA, parallel="fsdp2", penalty=True),
]


def all_trained(plans: list[Plan]) -> list[dict]:
    return [trained(plan) for plan in plans]


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 3, 4])
def test_any_number_of_processes_takes_the_steps_of_one(n: int, tmp_path: Path) -> None:
    plans = [plan for plan in PLANS if plan.parallel == "ddp" or plan.batch_size // plan.micro_batch % n == 0]
    assert len(plans) >= 3
    found = on_processes(n, all_trained, plans, folder=tmp_path)
    for plan, of_plan in zip(plans, zip(*found, strict=True), strict=True):
        expected = trained(plan)
        for of_rank in of_plan:
            assert_same(of_rank, expected)
        keys = [key for of_rank in of_plan for key in of_rank["seen"]]
        assert sorted(keys) == sorted(expected["seen"])
        for epoch in range(20):
            seen = [i for e, i in keys if e == epoch]
            assert len(seen) == len(set(seen)) == VIDEOS // 8 * 8


def test_how_many_clips_go_through_the_model_together_changes_nothing() -> None:
    plan = replace(PLAN, micro_batch=8, clips_at_once=8)
    expected = trained(plan)
    assert_same(trained(replace(plan, clips_at_once=3)), expected)
    assert_same(trained(replace(plan, clips_at_once=2)), expected)


def test_micro_batches_of_any_size_take_the_same_steps_with_one_alpha_a_step() -> None:
    plan = replace(ONE_ALPHA, micro_batch=8)
    assert_same(trained(replace(plan, micro_batch=2)), trained(plan))
    other = trained(replace(plan, alpha_per="micro-batch", micro_batch=2))
    assert distance(other["weights"], trained(plan)["weights"]) > 1e-3
