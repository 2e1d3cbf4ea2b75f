import copy
import gc
import pickle
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_modules import Phase, batch, identical, modules, moved, snapshot
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import checkpoint

from applications.openvclip.training.memory import Allocations
from interpolate import InterpolatedWeightRegularizer, WeightMismatchError, _strategies
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
    theta, alpha = trainable_weights(plain), regularizer.alpha
    with torch.no_grad():
        for name, p in trainable_weights(tilde).items():
            p.copy_((1 - alpha) * theta[name] + alpha * regularizer.anchor[name])
    loss_fn(plain).backward()
    loss_fn(tilde).backward()
    g, g_tilde = gradients(plain), gradients(tilde)
    return {name: g[name] + regularizer.strength * g_tilde[name] if name in theta else g[name] for name in g}


def mse(x: Tensor, y: Tensor):
    return lambda model: F.mse_loss(model(x), y)


STRATEGIES = "functional", "in_place"


@given(modules(), st.floats(0, 0.99), st.floats(0, 10), st.integers(0, 100), st.sampled_from(STRATEGIES))
def test_gradients_are_those_of_an_explicit_copy(model, max_alpha, strength, seed, strategy):
    regularizer = regularizer_away_from_anchor(
        model, max_alpha=max_alpha, strength=strength, seed=seed, strategy=strategy
    )
    loss_fn = mse(*batch())
    expected = explicit_gradients(regularizer, loss_fn)
    after_plain_step = snapshot(copy.deepcopy(model))
    regularizer.backward(loss_fn)
    torch.testing.assert_close(gradients(model), expected)
    assert all(torch.equal(p, after_plain_step[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_complex_parameters_are_left_to_the_plain_pass_where_both_terms_are_at_theta(strategy):
    model, loss_fn = nn.Sequential(nn.Linear(3, 3), Phase()).double(), mse(*batch())
    regularizer = regularizer_away_from_anchor(model, max_alpha=0, strength=1, strategy=strategy)
    expected = explicit_gradients(regularizer, loss_fn)
    regularizer.backward(loss_fn)
    torch.testing.assert_close(gradients(model), expected)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_anchor_elsewhere_passes_by_a_weight_at_a_time(strategy: str, monkeypatch: pytest.MonkeyPatch):
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3)).double()
    regularizer = regularizer_away_from_anchor(model, strategy=strategy, anchor_device="cpu")
    loss_fn = mse(*batch())
    expected, own = explicit_gradients(regularizer, loss_fn), snapshot(model)
    monkeypatch.setattr(_strategies, "_together", lambda theta, anchor: False)  # as if the model were on an accelerator
    regularizer.backward(loss_fn)
    torch.testing.assert_close(gradients(model), expected)
    assert all(torch.equal(p, own[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_anchor_stays_on_a_device_of_its_own(strategy: str):
    anchor = trainable_weights(nn.Linear(2, 1))
    model = nn.Linear(2, 1, device="meta")  # a device that is not that of the anchor
    regularizer = InterpolatedWeightRegularizer(model, anchor=anchor, anchor_device="cpu", strategy=strategy)
    x = torch.empty(3, 2, device="meta")
    regularizer.backward(lambda model: model(x).sum())
    regularizer.move_anchor(anchor, weight=0.5)
    if strategy == "functional":
        (regularizer(x).sum() + regularizer.at_anchor(x).sum()).backward()
    restored = InterpolatedWeightRegularizer(model, anchor_device="cpu", anchor=anchor)
    restored.load_state_dict(regularizer.state_dict())
    for one in (regularizer, restored):
        assert {name: a.device.type for name, a in one.anchor.items()} == {"weight": "cpu", "bias": "cpu"}
        assert all(torch.equal(one.anchor[name], a) for name, a in anchor.items())
    assert model.weight.grad.device.type == "meta"


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_anchor_elsewhere_saves_a_copy_of_the_weights(strategy: str):
    def peak(anchor_device: str | None) -> float:
        with FakeTensorMode(), Allocations("cpu") as allocations:  # neither device need be there
            model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(20)))
            regularizer = InterpolatedWeightRegularizer(model, anchor_device=anchor_device, strategy=strategy)
            for _ in range(2):
                regularizer.backward(lambda model: model(torch.empty(2, 64)).sum())
            return allocations.peak / sum(p.nbytes for p in model.parameters())

    assert peak(None) - peak("meta") == pytest.approx(1, abs=0.06)  # all but one weight of 20


@given(modules(), st.integers(0, 100))
def test_the_written_out_form_gives_the_same_gradients(model, seed):
    x, y = batch()
    regularizer = regularizer_away_from_anchor(model, seed=seed)
    expected = explicit_gradients(regularizer, mse(x, y))
    (F.mse_loss(model(x), y) + regularizer.beta * F.mse_loss(regularizer(x), y)).backward()
    torch.testing.assert_close(gradients(model), expected)


@given(modules(), st.sampled_from(STRATEGIES))
def test_buffers_change_as_in_a_plain_step(model, strategy):
    loss_fn = mse(*batch())
    plain, regularizer = copy.deepcopy(model), regularizer_away_from_anchor(model, strategy=strategy)
    loss_fn(plain).backward()
    regularizer.backward(loss_fn)
    assert identical(snapshot(model), snapshot(plain))


@given(modules(), st.sampled_from(STRATEGIES))
def test_gradients_accumulate(model, strategy):
    regularizer = regularizer_away_from_anchor(model, strategy=strategy)
    loss_fn = mse(*batch())
    once = explicit_gradients(regularizer, loss_fn)
    with regularizer.one_step():
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


def alphas_of(regularizer: InterpolatedWeightRegularizer, indices) -> list[float]:
    """The alphas that are drawn in calls for these micro-batches; the loss of a weight tells."""
    drawn = []
    for index in indices:
        regularizer.backward(lambda model: model(torch.ones(1).double()).sum(), index=index)
        drawn.append(1 - regularizer.interpolated_loss.item())
    return drawn


def from_one_to_zero(**options) -> InterpolatedWeightRegularizer:
    """Theta is 1 and the anchor 0, so that the interpolated weight is 1 - alpha."""
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.ones_(model.weight)
    return InterpolatedWeightRegularizer(model, anchor={"weight": torch.zeros(1, 1)}, **options)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("passes", ["both", "random"])
def test_alpha_is_a_function_of_seed_step_and_index(strategy: str, passes: str):
    regularizer = from_one_to_zero(seed=3, strategy=strategy, passes=passes, strength=1e9)  # random: never theta
    for step in range(3):
        assert regularizer.step == step
        expected = [regularizer.alpha_of(index) for index in range(4)]
        assert len(set(expected)) == 4
        with regularizer.one_step():
            assert alphas_of(regularizer, [2, 0, 1, 3, 1]) == pytest.approx([expected[i] for i in (2, 0, 1, 3, 1)])
        assert expected[0] != regularizer.alpha


def test_a_call_with_an_index_is_a_step_unless_told_otherwise():
    regularizer = from_one_to_zero()
    expected = regularizer.alpha_of(5)
    assert alphas_of(regularizer, [5]) == pytest.approx([expected])
    assert regularizer.step == 1
    with pytest.raises(ValueError, match="counted from 0, got -1"):
        regularizer.alpha_of(-1)


def test_run_interpolated_takes_the_index_of_a_micro_batch():
    regularizer = from_one_to_zero()
    with regularizer.one_step():
        for index in (1, 0):
            weight = regularizer.run_interpolated(lambda model: model.weight.item(), index=index)
            assert weight == pytest.approx(1 - regularizer.alpha_of(index))
    assert regularizer.step == 1


def test_a_step_that_is_broken_off_has_not_ended():
    regularizer = from_one_to_zero()
    with pytest.raises(ValueError, match="counted from 0"), regularizer.one_step():
        alphas_of(regularizer, [0, -1])
    assert regularizer.step == 0
    with pytest.raises(RuntimeError, match="can't be part"), regularizer.one_step(), regularizer.one_step():
        pass
    alphas_of(regularizer, [0])
    assert regularizer.step == 1


@pytest.mark.parametrize("written_out", [False, True])
def test_the_closures_of_lbfgs_share_an_alpha(written_out: bool):
    regularizer, alphas, (x, y) = from_one_to_zero(), [], (torch.ones(4, 1).double(), torch.zeros(4, 1).double())
    model = regularizer.model
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=4, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        alphas.append(regularizer.alpha)
        if not written_out:
            return regularizer.backward(lambda model: F.mse_loss(model(x), y))
        loss = F.mse_loss(model(x), y) + regularizer.beta * F.mse_loss(regularizer(x), y)
        loss.backward()
        return loss.detach()

    for step in (1, 2):
        nn.init.ones_(model.weight)
        optimizer.step(closure)
        assert regularizer.step == step
        assert len(alphas) > step
        assert len(set(alphas)) == step


def pickled(regularizer: InterpolatedWeightRegularizer) -> InterpolatedWeightRegularizer:
    return pickle.loads(pickle.dumps(regularizer))  # noqa: S301 # written a moment ago


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, pickled])
def test_copies_follow_optimizers_too(copied):
    regularizer, alphas = copied(from_one_to_zero()), []
    optimizer = torch.optim.LBFGS(regularizer.model.parameters(), max_iter=4)

    def closure() -> Tensor:
        optimizer.zero_grad()
        alphas.append(regularizer.alpha)
        return regularizer.backward(lambda model: model(torch.ones(4, 1).double()).square().mean())

    optimizer.step(closure)
    assert len(alphas) > 1
    assert len(set(alphas)) == regularizer.step == 1


@pytest.mark.parametrize("seed", [1.5, None, "a"])
def test_a_seed_is_a_whole_number(seed):
    with pytest.raises(ValueError, match="seed must be a whole number"):
        InterpolatedWeightRegularizer(nn.Linear(1, 1), seed=seed)
    resumed = InterpolatedWeightRegularizer(nn.Linear(1, 1))
    resumed.load_state_dict((before := InterpolatedWeightRegularizer(nn.Linear(1, 1), seed=True)).state_dict())
    assert resumed.alpha == before.alpha


def test_a_model_without_values_has_no_anchor():
    with pytest.raises(ValueError, match="meta device, without values"):
        InterpolatedWeightRegularizer(nn.Linear(1, 1, device="meta"))


@pytest.mark.parametrize("loss", [None, (torch.ones(1),)])
def test_a_loss_that_is_none_is_told_so(loss):
    with pytest.raises(TypeError, match="loss_fn must return the loss, a tensor with one element, got"):
        InterpolatedWeightRegularizer(nn.Linear(1, 1)).backward(lambda model: loss)


def test_a_closure_that_fails_does_not_hold_the_step_for_ever():
    regularizer, failing = from_one_to_zero(), [True]
    optimizer = torch.optim.SGD(regularizer.model.parameters(), lr=0.0)

    def closure() -> Tensor:
        loss = regularizer.backward(lambda model: model(torch.ones(1).double()).sum())
        if failing.pop():
            raise KeyboardInterrupt
        return loss

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    failing.append(False)
    optimizer.step(closure)
    assert regularizer.step == 2  # as without a closure, where the loss had been used before the failure
    optimizer.step()
    alphas_of(regularizer, [0])
    optimizer.step()
    assert regularizer.step == 3


@pytest.mark.parametrize("passes", ["both", "split", "random"])
@pytest.mark.parametrize("options", [{"strength": 0.0}, {"max_alpha": 0.0}])
def test_what_adds_nothing_or_is_at_theta_costs_one_pass(options: dict, passes: str):
    model, calls, (x, y) = nn.Linear(3, 3).double(), [], batch()
    regularizer = regularizer_away_from_anchor(model, passes=passes, **options)
    expected = explicit_gradients(regularizer, mse(x, y))

    def loss_fn(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        calls.append(len(x))
        return F.mse_loss(model(x), y)

    loss = regularizer.backward(loss_fn, x, y)
    assert calls == [len(x)]
    torch.testing.assert_close(gradients(model), expected)
    torch.testing.assert_close(loss, F.mse_loss(model(x), y).detach())
    assert (regularizer.interpolated_loss is None) == (not regularizer.strength)
    assert regularizer.step == 1


def test_a_regularizer_is_not_kept_alive_by_optimizers():
    regularizer = from_one_to_zero()
    gone = weakref.ref(regularizer)
    del regularizer
    gc.collect()
    assert gone() is None
    torch.optim.SGD([nn.Parameter(torch.ones(1))]).step()


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


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_exception_in_the_loss_leaves_the_weights_alone(strategy: str):
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    regularizer, own = regularizer_away_from_anchor(model, strategy=strategy), snapshot(model)

    def failing(model: nn.Module) -> Tensor:
        model(torch.randn(4, 2))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        regularizer.backward(failing)
    assert identical(snapshot(model), own)
    assert regularizer.step == 0


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.use_reentrant = use_reentrant
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = checkpoint(lambda x, layer=layer: layer(x).tanh(), x, use_reentrant=self.use_reentrant)
        return x


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_layers_are_recomputed_at_the_interpolated_weights(use_reentrant: bool, strategy: str):
    model, x, y = Checkpointed(use_reentrant), torch.randn(8, 4, requires_grad=True), torch.randn(8, 4)
    regularizer = regularizer_away_from_anchor(model, strategy=strategy)
    expected = explicit_gradients(regularizer, mse(x, y))
    regularizer.backward(mse(x, y))
    torch.testing.assert_close(gradients(model), expected)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_forward_calls_through_checkpointed_layers_are_refused(use_reentrant: bool):
    regularizer = regularizer_away_from_anchor(Checkpointed(use_reentrant))
    with pytest.raises(RuntimeError, match=r"gradient checkpointing .* Use regularizer\.backward\(loss_fn\)"):
        regularizer(torch.randn(8, 4, requires_grad=True))


def wrapped_checkpoints() -> nn.Module:
    return nn.Sequential(checkpoint_wrapper(nn.Linear(4, 4)), nn.Tanh(), checkpoint_wrapper(nn.Linear(4, 4)))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_checkpoint_wrappers_put_no_prefix_before_names(strategy: str):
    model, bare, loss_fn = (
        wrapped_checkpoints(),
        nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)),
        mse(torch.randn(8, 4), torch.randn(8, 4)),
    )
    anchor = snapshot(bare)
    bare.load_state_dict(trainable_weights(model))
    for m in (model, bare):
        InterpolatedWeightRegularizer(m, anchor=anchor, strategy=strategy).backward(loss_fn)
    torch.testing.assert_close({n: p.grad for n, p in trainable_weights(model).items()}, gradients(bare))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_no_stale_cast_survives_autocast(strategy: str):
    model, x, y = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), torch.randn(4, 8), torch.randn(4, 8)
    regularizer = regularizer_away_from_anchor(model, strategy=strategy)

    def loss_fn(model: nn.Module) -> Tensor:
        return F.mse_loss(model(x).float(), y)

    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        expected = explicit_gradients(regularizer, loss_fn)
    with torch.autocast("cpu", torch.bfloat16):
        loss_fn(model)  # leaves casts of theta in the cache
        regularizer.backward(loss_fn)
    torch.testing.assert_close(gradients(model), expected, rtol=0.05, atol=0.02)  # bf16 sums; a stale cast is 20 % off


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_grad_scaler_scales_both_passes(strategy: str):
    model, (x, y) = nn.Linear(3, 3).double(), batch()
    regularizer = regularizer_away_from_anchor(model, strategy=strategy)
    expected = explicit_gradients(regularizer, mse(x, y))
    scaler, optimizer = torch.amp.GradScaler("cpu", init_scale=1024.0), torch.optim.SGD(model.parameters())
    loss = regularizer.backward(lambda model: scaler.scale(F.mse_loss(model(x), y)))
    torch.testing.assert_close(loss / scaler.get_scale(), F.mse_loss(model(x), y).detach())
    scaler.unscale_(optimizer)
    torch.testing.assert_close(gradients(model), expected)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_compiled_models_see_the_interpolated_weights(strategy: str):
    model, (x, y) = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).double(), batch()
    compiled = torch.compile(model, backend="aot_eager")
    regularizer = regularizer_away_from_anchor(model, strategy=strategy)
    of_compiled = InterpolatedWeightRegularizer(compiled, anchor=regularizer.anchor, strategy=strategy)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        expected = explicit_gradients(regularizer, mse(x, y))
        of_compiled.backward(mse(x, y))
        torch.testing.assert_close(gradients(model), expected)
        regularizer.step += 1
        optimizer.step()
        optimizer.zero_grad()
    if strategy == "functional":
        expected = explicit_gradients(regularizer, mse(x, y))
        (F.mse_loss(compiled(x), y) + of_compiled.beta * F.mse_loss(of_compiled(x), y)).backward()
        torch.testing.assert_close(gradients(model), expected)


def test_dropout_is_drawn_anew_in_each_pass():
    model = nn.Sequential(nn.Linear(100, 100, bias=False), nn.Dropout(0.5))
    outputs = []

    def loss_fn(model: nn.Module) -> Tensor:
        outputs.append(model(torch.ones(1, 100)))
        return outputs[-1].sum()

    InterpolatedWeightRegularizer(model).backward(loss_fn)  # at the anchor: both passes have the same weights
    assert not torch.equal(*outputs)


class SharedPart(nn.Module):
    """One submodule under two names, used through both."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = nn.Sequential(self.first, nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_submodule_under_two_names_sees_the_interpolated_weights(strategy: str):
    model, loss_fn = SharedPart().double(), mse(*batch())
    assert regularizer_away_from_anchor(model).strategy == "functional"
    regularizer = regularizer_away_from_anchor(model, strategy=strategy)
    expected, own = explicit_gradients(regularizer, loss_fn), list(model.parameters())
    regularizer.backward(loss_fn)
    torch.testing.assert_close(gradients(model), expected)
    assert [p is q for p, q in zip(own, model.parameters(), strict=True)] == [True, True]
    assert model.second[0].weight is model.first.weight


def test_gradient_hooks_of_parameters_see_both_passes():
    model, (x, y) = nn.Linear(3, 3).double(), batch()
    model.weight.register_hook(lambda gradient: gradient * 0)
    regularizer = regularizer_away_from_anchor(model)
    assert regularizer.strategy == "in_place"
    regularizer.backward(mse(x, y))
    assert model.weight.grad.abs().max() == 0


def test_hooks_that_come_too_late_are_refused():
    model, (x, y) = nn.Linear(3, 3).double(), batch()
    regularizer = regularizer_away_from_anchor(model)
    handle = model.weight.register_hook(lambda gradient: gradient * 0)
    with pytest.raises(RuntimeError, match=r"weight: gradient hooks.*before the regularizer is made"):
        regularizer.backward(mse(x, y))
    handle.remove()
    regularizer.backward(mse(x, y))
    swapping = regularizer_away_from_anchor(model, strategy="in_place")
    model.bias.register_post_accumulate_grad_hook(lambda p: None)
    with pytest.raises(RuntimeError, match="bias: post-accumulate-grad hooks"):
        swapping.backward(mse(x, y))


def test_an_optimizer_that_steps_within_backward_is_right_or_refused():
    model, (x, y) = nn.Linear(3, 3).double(), batch()
    regularizer = regularizer_away_from_anchor(model)
    expected, own = explicit_gradients(regularizer, mse(x, y)), snapshot(model)
    model.weight.register_post_accumulate_grad_hook(lambda p: [p.data.sub_(p.grad), None][1])
    regularizer.backward(mse(x, y))
    torch.testing.assert_close(model.weight.detach(), own["weight"] - expected["weight"])
    with pytest.raises(ValueError, match=r"post-accumulate-grad hooks of weight while .*\(as asked\)"):
        regularizer_away_from_anchor(model, strategy="in_place")


class KeepsAlias(nn.Module):
    """Uses its weight through whatever holds it beside the module's own parameters."""

    def __init__(self, hold) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3).double()
        self.alias = hold(self.linear.weight)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.alias() if callable(self.alias) else self.alias[-1]
        return F.linear(x, weight, self.linear.bias)


def explicit_gradients_of_alias(regularizer: InterpolatedWeightRegularizer, loss_fn) -> dict[str, Tensor]:
    anchor = {"weight": regularizer.anchor["linear.weight"], "bias": regularizer.anchor["linear.bias"]}
    return explicit_gradients(InterpolatedWeightRegularizer(regularizer.model.linear, anchor=anchor), loss_fn)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    "hold", [lambda w: [w], lambda w: (1, w), lambda w: [[w]].pop(0)], ids=["list", "tuple", "inner"]
)
def test_a_weight_that_is_held_twice_is_interpolated_in_both_places(strategy: str, hold):
    model, loss_fn = KeepsAlias(hold), mse(*batch())
    regularizer = InterpolatedWeightRegularizer(
        model, anchor={n: p + 1 for n, p in model.named_parameters()}, strategy=strategy
    )
    expected = explicit_gradients_of_alias(regularizer, loss_fn)
    regularizer.backward(loss_fn)
    torch.testing.assert_close(gradients(model.linear), expected)


def test_a_loss_that_goes_around_the_interpolated_weights_is_refused():
    model, loss_fn = KeepsAlias(lambda w: lambda: w), mse(*batch())
    anchor = {n: p + 1 for n, p in model.named_parameters()}
    with pytest.raises(RuntimeError, match=r"went around .*: 1 of the model's own weights \(linear\.weight\) got grad"):
        InterpolatedWeightRegularizer(model, anchor=anchor).backward(loss_fn)
    regularizer = InterpolatedWeightRegularizer(model, anchor=anchor, strategy="in_place")
    model.zero_grad()
    expected = explicit_gradients_of_alias(regularizer, loss_fn)
    regularizer.backward(loss_fn)
    torch.testing.assert_close(gradients(model.linear), expected)


def test_a_wrapper_that_can_not_be_right_is_refused():
    with pytest.raises(ValueError, match=r"DataParallel is not supported\. Use DistributedDataParallel"):
        InterpolatedWeightRegularizer(nn.DataParallel(nn.Linear(1, 1)))


def linear_loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).mean()


def test_split_passes_see_one_half_of_the_batch_each():
    model, x = nn.Linear(3, 1, bias=False).double(), torch.randn(5, 3).double()
    regularizer = regularizer_away_from_anchor(model, passes="split")
    regularizer.backward(linear_loss, x)
    # The gradient of a linear model is the mean of its inputs, whatever the weights.
    expected = x[2:].mean(0) + regularizer.strength * x[:2].mean(0)
    torch.testing.assert_close(model.weight.grad[0], expected)


def test_split_halves_nested_batches():
    seen = []

    def loss_fn(model: nn.Module, batch: dict, scale: float) -> Tensor:
        seen.append(({k: v.tolist() for k, v in batch.items()}, scale))
        return model(batch["x"][:, None]).mean()

    regularizer = InterpolatedWeightRegularizer(nn.Linear(1, 1), passes="split")
    regularizer.backward(loss_fn, {"x": torch.tensor([1.0, 2.0]), "y": torch.tensor([3, 4])}, 0.5)
    assert seen == [({"x": [1.0], "y": [3]}, 0.5), ({"x": [2.0], "y": [4]}, 0.5)]


@pytest.mark.parametrize(
    ("given_batch", "sizes"),
    [((), "no tensor"), ((torch.zeros(1, 1),), "[1]"), ((torch.zeros(4), torch.zeros(2)), "[2, 4]")],
)
def test_a_batch_that_can_not_be_halved_is_refused(given_batch: tuple, sizes: str):
    regularizer = InterpolatedWeightRegularizer(nn.Linear(1, 1), passes="split")
    with pytest.raises(ValueError, match="passes='split' halves the batch") as error:
        regularizer.backward(lambda model, *_: model(torch.ones(1)).sum(), *given_batch)
    assert f"got {sizes}" in str(error.value)


@pytest.mark.parametrize("passes", ["split", "random"])
def test_one_pass_estimators_are_unbiased(passes: str):
    model, (x, y) = nn.Linear(3, 3).double(), batch()
    x, y = torch.cat([x, x]), torch.cat([y, y])  # both halves alike: what is left to average is the draw
    regularizer = regularizer_away_from_anchor(model, passes=passes, strength=0.5, max_alpha=0.3)
    n, expected, total = 2000 if passes == "random" else 20, 0.0, 0.0
    for _ in range(n):
        expected += explicit_gradients(regularizer, mse(x, y))["weight"] / n
        regularizer.backward(lambda model, x, y: F.mse_loss(model(x), y), x, y)
        total += model.weight.grad / n
        model.zero_grad()
    # "random" has a standard error of about 1 % of the difference of the terms; "split" is exact here
    torch.testing.assert_close(total, expected, rtol=0.05, atol=0.02 if passes == "random" else 1e-6)


def test_random_passes_cost_one_evaluation():
    calls = []
    regularizer = InterpolatedWeightRegularizer(nn.Linear(1, 1), passes="random")
    for _ in range(20):
        regularizer.backward(lambda model: calls.append(1) or model(torch.ones(1)).sum())
    assert len(calls) == 20


def test_forward_calls_are_refused_for_one_pass_estimators():
    regularizer = InterpolatedWeightRegularizer(nn.Linear(1, 1), passes="random")
    with pytest.raises(RuntimeError, match=r"here strategy='functional', passes='random', model=Linear"):
        regularizer(torch.ones(1))


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
        ({"passes": "one"}, "passes must be 'both', 'split' or 'random', got 'one'"),
        ({"strategy": "swap"}, "strategy must be one of 'functional', 'in_place' or None, got 'swap'"),
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


def test_a_quantised_anchor_is_refused():
    codes = {"weight": torch.full((1, 1), 100, dtype=torch.int8), "bias": torch.zeros(1)}
    with pytest.raises(WeightMismatchError, match=r"1 of 2 weights of the anchor \(weight \(int8\)\) are not floating"):
        InterpolatedWeightRegularizer(nn.Linear(1, 1), anchor=codes)
    regularizer = InterpolatedWeightRegularizer(nn.Linear(1, 1))
    with pytest.raises(WeightMismatchError, match=r"weight \(int8\)"):
        regularizer.load_state_dict({"step": 0, "seed": 0, "anchor": codes})


def test_weights_frozen_on_the_way_are_named():
    model = nn.Linear(1, 1)
    regularizer = InterpolatedWeightRegularizer(model)
    model.bias.requires_grad_(False)
    with pytest.raises(WeightMismatchError, match=r"1 of 2 weights unexpected \(bias\)"):
        regularizer.backward(lambda model: model(torch.ones(1)).sum())
