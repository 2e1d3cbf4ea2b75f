import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_modules import batch, identical, modules, moved, snapshot
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from interpolate import InterpolatedWeightRegularizer, WeightMismatchError, patch
from interpolate.weights import trainable_weights

F = nn.functional


def regularizer_away_from_anchor(model: nn.Module, **options) -> InterpolatedWeightRegularizer:
    """Around the given model, anchored somewhere else."""
    return InterpolatedWeightRegularizer(model, anchor=trainable_weights(moved(model)), **options)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def explicit_gradients(regularizer: InterpolatedWeightRegularizer, loss_fn) -> dict[str, Tensor]:
    """`g(theta) + strength * g(theta_tilde)` from two explicit copies of the model."""
    plain, tilde = copy.deepcopy(regularizer.model), copy.deepcopy(regularizer.model)
    theta = trainable_weights(plain)
    tilde.load_state_dict(patch(regularizer.anchor, theta, anchor_weight=regularizer.alpha), strict=False)
    loss_fn(plain).backward()
    loss_fn(tilde).backward()
    g, g_tilde = gradients(plain), gradients(tilde)
    return {name: g[name] + regularizer.strength * g_tilde[name] if name in theta else g[name] for name in g}


def mse(x: Tensor, y: Tensor):
    return lambda model: F.mse_loss(model(x), y)


@given(modules(), st.floats(0, 0.99), st.floats(0, 10), st.integers(0, 100))
def test_gradients_are_those_of_an_explicit_copy(model, max_alpha, strength, seed):
    regularizer = regularizer_away_from_anchor(model, max_alpha=max_alpha, strength=strength, seed=seed)
    loss_fn = mse(*batch())
    expected = explicit_gradients(regularizer, loss_fn)
    after_plain_step = snapshot(copy.deepcopy(model))
    regularizer.backward(loss_fn)
    torch.testing.assert_close(gradients(model), expected)
    assert all(torch.equal(p, after_plain_step[n]) for n, p in model.named_parameters())


@given(modules(), st.integers(0, 100))
def test_the_written_out_form_gives_the_same_gradients(model, seed):
    x, y = batch()
    regularizer = regularizer_away_from_anchor(model, seed=seed)
    expected = explicit_gradients(regularizer, mse(x, y))
    (F.mse_loss(model(x), y) + regularizer.beta * F.mse_loss(regularizer(x), y)).backward()
    torch.testing.assert_close(gradients(model), expected)


@given(modules())
def test_buffers_change_as_in_a_plain_step(model):
    loss_fn = mse(*batch())
    plain, regularizer = copy.deepcopy(model), regularizer_away_from_anchor(model)
    loss_fn(plain).backward()
    regularizer.backward(loss_fn)
    assert identical(snapshot(model), snapshot(plain))


@given(modules())
def test_gradients_accumulate(model):
    regularizer = regularizer_away_from_anchor(model, max_alpha=0)  # alpha 0: both steps at the same weights
    loss_fn = mse(*batch())
    once = explicit_gradients(regularizer, loss_fn)
    regularizer.backward(loss_fn)
    regularizer.backward(loss_fn)
    torch.testing.assert_close(gradients(model), {n: 2 * g for n, g in once.items()})


@given(modules(), st.integers(0, 5))
@settings(max_examples=10)
def test_a_resumed_run_equals_one_never_interrupted(model, interrupted):
    anchor, data = trainable_weights(moved(model)), [batch() for _ in range(5)]

    def run(model, regularizer, steps):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for x, y in steps:
            regularizer.backward(mse(x, y))
            optimizer.step()
            optimizer.zero_grad()

    uninterrupted = copy.deepcopy(model)
    run(uninterrupted, InterpolatedWeightRegularizer(uninterrupted, anchor=anchor, seed=3), data)

    first = InterpolatedWeightRegularizer(model, anchor=anchor, seed=3)
    run(model, first, data[:interrupted])
    state = copy.deepcopy(first.state_dict())
    second = InterpolatedWeightRegularizer(model, seed=4)  # anchor and seed come back with the state
    second.load_state_dict(state)
    run(model, second, data[interrupted:])
    assert identical(snapshot(model), snapshot(uninterrupted))


@given(st.integers(0, 2**31), st.floats(0, 0.99))
def test_alpha_depends_on_seed_and_step_alone(seed: int, max_alpha: float):
    def alphas() -> list[float]:
        model = nn.Linear(1, 1)
        regularizer = InterpolatedWeightRegularizer(model, max_alpha, seed=seed)
        drawn = []
        for _ in range(3):
            torch.rand(1)  # the global generator does not matter
            drawn.append(regularizer.alpha)
            regularizer.backward(lambda model: model(torch.ones(1)).sum())
        return drawn

    drawn = alphas()
    assert drawn == alphas()
    assert all(0 <= alpha <= max_alpha for alpha in drawn)
    assert max_alpha < 1e-9 or len(set(drawn)) == 3


def test_alpha_is_uniform_over_its_range():
    regularizer = InterpolatedWeightRegularizer(nn.Linear(1, 1), max_alpha=0.6)
    drawn = []
    for _ in range(2000):
        drawn.append(regularizer.alpha)
        regularizer.backward(lambda model: model(torch.ones(1)).sum())
    deciles = torch.histc(torch.tensor(drawn), bins=10, min=0, max=0.6)
    assert deciles.sum() == 2000
    assert (deciles - 200).abs().max() < 80  # six standard deviations; the seed is fixed


def test_beta_cancels_the_chain_rule():
    regularizer = InterpolatedWeightRegularizer(nn.Linear(1, 1), strength=0.5)
    assert regularizer.beta == 0.5 / (1 - regularizer.alpha)


def test_both_losses_are_reported():
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 2.0)
    regularizer = InterpolatedWeightRegularizer(model, anchor={"weight": torch.zeros(1, 1)})
    alpha = regularizer.alpha
    loss = regularizer.backward(lambda model: model(torch.ones(1)).sum())
    assert loss.item() == 2.0
    assert regularizer.interpolated_loss.item() == pytest.approx(2 * (1 - alpha))
    assert not loss.requires_grad
    assert not regularizer.interpolated_loss.requires_grad


def test_the_anchor_is_a_copy():
    model = nn.Linear(1, 1)
    before = model.weight.detach().clone()
    regularizer = InterpolatedWeightRegularizer(model)
    nn.init.constant_(model.weight, 5.0)
    assert torch.equal(regularizer.anchor["weight"], before)


def test_an_exception_in_the_loss_leaves_the_weights_alone():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    regularizer, own = regularizer_away_from_anchor(model), snapshot(model)

    def failing(model: nn.Module) -> Tensor:
        model(torch.randn(4, 2))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        regularizer.backward(failing)
    assert identical(snapshot(model), own)
    assert regularizer.step == 0


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_layers_are_recomputed_at_the_interpolated_weights(use_reentrant: bool):
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = checkpoint(lambda x, layer=layer: layer(x).tanh(), x, use_reentrant=use_reentrant)
            return x

    model, x, y = Checkpointed(), torch.randn(8, 4, requires_grad=True), torch.randn(8, 4)
    regularizer = regularizer_away_from_anchor(model)
    expected = explicit_gradients(regularizer, mse(x, y))
    regularizer.backward(mse(x, y))
    torch.testing.assert_close(gradients(model), expected)


def test_no_stale_cast_survives_autocast():
    model, x, y = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), torch.randn(4, 8), torch.randn(4, 8)
    regularizer = regularizer_away_from_anchor(model)

    def loss_fn(model: nn.Module) -> Tensor:
        return F.mse_loss(model(x).float(), y)

    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        expected = explicit_gradients(regularizer, loss_fn)
    with torch.autocast("cpu", torch.bfloat16):
        regularizer.backward(loss_fn)
    torch.testing.assert_close(gradients(model), expected, rtol=0.05, atol=0.02)  # bf16 sums; a stale cast is 20 % off


def test_the_step_of_a_forward_call_ends_with_its_backward():
    model = nn.Linear(1, 1)
    regularizer = regularizer_away_from_anchor(model)
    regularizer(torch.ones(1)).sum()  # never goes backward: the alpha is not used up
    alpha = regularizer.alpha
    first, second = regularizer(torch.ones(1)).sum(), regularizer(torch.ones(1)).sum()
    (first + second).backward()
    assert regularizer.step == 1
    assert regularizer.alpha != alpha


def test_a_forward_call_of_an_ended_step_cannot_go_backward():
    model = nn.Linear(1, 1)
    regularizer = regularizer_away_from_anchor(model)
    first, second = regularizer(torch.ones(1)).sum(), regularizer(torch.ones(1)).sum()
    first.backward()
    assert regularizer.step == 1
    with pytest.raises(RuntimeError, match="forward pass of step 0, but step 0 has ended"):
        second.backward()


def test_evaluating_at_interpolated_weights_uses_no_step_up():
    regularizer = regularizer_away_from_anchor(nn.Linear(1, 1))
    with torch.no_grad():
        regularizer(torch.ones(1))
    assert regularizer.step == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_alpha": 1.0}, r"max_alpha .* must be in \[0, 1\), got 1\.0"),
        ({"max_alpha": -0.1}, r"max_alpha .* must be in \[0, 1\), got -0\.1"),
        ({"max_alpha": float("nan")}, r"max_alpha .* must be in \[0, 1\), got nan"),
        ({"strength": -1.0}, r"strength must be finite and not negative, got -1\.0"),
        ({"strength": float("nan")}, r"strength must be finite and not negative, got nan"),
        ({"strength": float("inf")}, r"strength must be finite and not negative, got inf"),
    ],
)
def test_arguments_outside_their_range_are_refused(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        InterpolatedWeightRegularizer(nn.Linear(1, 1), **options)


def test_a_model_with_nothing_to_train_is_refused():
    with pytest.raises(ValueError, match="Linear has no trainable floating-point parameter"):
        InterpolatedWeightRegularizer(nn.Linear(1, 1).requires_grad_(False))


def test_an_anchor_of_another_model_is_refused():
    with pytest.raises(WeightMismatchError, match=r"bias: theta \(1,\), anchor \(2,\)"):
        InterpolatedWeightRegularizer(nn.Linear(1, 1), anchor=nn.Linear(1, 2).state_dict())


def test_weights_frozen_on_the_way_are_named():
    model = nn.Linear(1, 1)
    regularizer = InterpolatedWeightRegularizer(model)
    model.bias.requires_grad_(False)
    with pytest.raises(WeightMismatchError, match=r"1 of 2 weights unexpected \(bias\)"):
        regularizer.backward(lambda model: model(torch.ones(1)).sum())
