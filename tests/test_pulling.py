import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_modules import modules, moved
from torch import nn

from interpolate import EMAAverager, InterpolatedWeightRegularizer, WeightMismatchError, patch, pull
from interpolate.weights import trainable_weights


@given(modules(), st.floats(0, 1))
def test_pulling_is_patching_in_place(model: nn.Module, weight: float):
    theta, other = moved(model), model
    expected = patch(trainable_weights(other), trainable_weights(theta), anchor_weight=weight)
    identities = [id(p) for p in theta.parameters()]
    rest = {n: t.clone() for n, t in theta.state_dict().items()}
    pull(theta, other, weight=weight)
    for name, p in trainable_weights(theta).items():
        assert torch.equal(p, expected[name])
    assert identities == [id(p) for p in theta.parameters()]
    for name, buffer in theta.named_buffers():
        assert torch.equal(buffer, rest[name])


def test_wider_weights_are_rounded_once():
    model = nn.Linear(64, 64, bias=False).bfloat16()
    toward = {"weight": torch.randn(64, 64)}
    exact = 0.7 * model.weight.double() + 0.3 * toward["weight"].double()
    pull(model, toward, weight=0.3)
    assert (model.weight != exact.to(torch.bfloat16)).sum() <= 2  # float32 between, which ties may tell


def test_other_names_of_a_model_do_not_matter():
    model = nn.Linear(2, 2)
    toward = {f"module.{n}": torch.zeros_like(p) for n, p in model.named_parameters()}
    pull(nn.DataParallel(model), toward, weight=1)
    assert not model.weight.any()


def test_nothing_is_pulled_if_something_does_not_fit():
    model = nn.Linear(2, 2)
    before = copy.deepcopy(model.state_dict())
    for toward, error, message in (
        ({"weight": torch.zeros(2, 2)}, WeightMismatchError, r"toward does not match the model: .* missing \(bias\)"),
        (
            {"weight": torch.zeros(2, 2), "bias": torch.zeros(3)},
            WeightMismatchError,
            r"the model \(2,\), toward \(3,\)",
        ),
        (dict(model.state_dict(), other=torch.zeros(1)), WeightMismatchError, r"unexpected \(other\)"),
        (
            {"weight": torch.zeros(2, 2), "bias": torch.full([2], torch.nan)},
            ValueError,
            r"bias has 2 values that are not",
        ),
        ({"weight": torch.ones(2, 2, dtype=torch.int8), "bias": torch.zeros(2)}, ValueError, r"quantised weights"),
    ):
        with pytest.raises(error, match=message):
            pull(model, toward, weight=0.5)
    with pytest.raises(ValueError, match=r"weight is the weight of toward and must be in \[0, 1\], got 1\.5"):
        pull(model, before, weight=1.5)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


def test_infinite_weights_that_are_equal_stay():
    model = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[-torch.inf, 1.0]]))
    pull(model, {"weight": torch.tensor([[-torch.inf, 0.0]])}, weight=0.5)
    assert model.weight.tolist() == [[-torch.inf, 0.5]]


def test_an_open_autocast_sees_what_was_pulled():
    model, x = nn.Linear(2, 1, bias=False), torch.ones(1, 2)
    with torch.autocast("cpu", torch.bfloat16):
        model(x)
        pull(model, {"weight": torch.zeros(1, 2)}, weight=1)
        assert model(x).item() == 0


def test_a_moved_anchor_is_what_the_next_step_stays_near():
    torch.manual_seed(0)
    model = nn.Linear(3, 1).double()
    regularizer = InterpolatedWeightRegularizer(model, strength=0.5)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    regularizer.move_anchor(weight=0.25)
    for name, tensor in regularizer.anchor.items():
        torch.testing.assert_close(tensor, start[name] + 0.25)
    x, alpha = torch.randn(5, 3).double(), regularizer.alpha
    regularizer.backward(lambda model: (model(x) ** 2).mean())
    weight, bias = model.weight.detach(), model.bias.detach()
    tilde = [
        t + alpha * (a - t) for t, a in ((weight, regularizer.anchor["weight"]), (bias, regularizer.anchor["bias"]))
    ]
    g = lambda w, b: (2 * (x @ w.T + b) * x).mean(0, keepdim=True)  # noqa: E731 # a formula
    torch.testing.assert_close(model.weight.grad, g(weight, bias) + 0.5 * g(*tilde))


def test_the_anchor_moves_to_given_weights_and_is_resumed_where_it_is():
    model = nn.Linear(2, 2)
    averager = EMAAverager(model, decay=0.5)
    averager.update()
    regularizer = InterpolatedWeightRegularizer(
        model, anchor={n: torch.zeros_like(p) for n, p in model.named_parameters()}
    )
    regularizer.move_anchor(averager.weights)
    assert torch.equal(regularizer.anchor["weight"], model.weight)
    resumed = InterpolatedWeightRegularizer(model, anchor={n: torch.zeros_like(p) for n, p in model.named_parameters()})
    resumed.load_state_dict(regularizer.state_dict())
    assert torch.equal(resumed.anchor["weight"], model.weight)
    with pytest.raises(WeightMismatchError, match=r"toward does not match the anchor: 1 of 2 weights missing \(bias\)"):
        regularizer.move_anchor({"weight": torch.zeros(2, 2)}, weight=0.5)
    with pytest.raises(ValueError, match=r"weight is the weight of toward and must be in \[0, 1\], got -1"):
        regularizer.move_anchor(weight=-1)
