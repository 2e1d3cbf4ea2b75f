"""Ways to mix weights that look right and are silently wrong, each next to how it is done here.

The traps of DDP and FSDP2 stand in `tests/distributed`, that of gradient checkpointing and of autocast are shown here.
"""

import copy

import pytest
import torch
from random_modules import identical, snapshot
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from interpolate import InterpolatedWeightRegularizer, SWAAverager, WeightMismatchError, applied, patch
from interpolate.weights import trainable_weights

F = nn.functional


def zeros_like(model: nn.Module) -> dict[str, Tensor]:
    return {name: torch.zeros_like(p) for name, p in model.named_parameters()}


def test_plain_autograd_through_the_interpolation_lacks_the_factor_that_beta_restores():
    model, x = nn.Linear(2, 1, bias=False).double(), torch.randn(3, 2).double()
    regularizer = InterpolatedWeightRegularizer(model, anchor=zeros_like(model), max_alpha=0.9, strength=1.0)
    alpha = regularizer.alpha
    assert alpha > 0.1
    tilde = {"weight": (1 - alpha) * model.weight}
    functional_call(model, tilde, (x,)).sum().backward()
    naive, model.weight.grad = model.weight.grad, None
    exact = x.sum(0, keepdim=True)  # the gradient at theta_tilde, of a linear model
    torch.testing.assert_close(naive, (1 - alpha) * exact)
    regularizer.backward(lambda model: model(x).sum())
    torch.testing.assert_close(model.weight.grad, (1 + regularizer.strength) * exact)


def test_functional_call_corrupts_a_submodule_under_two_names():
    model = nn.Module()
    model.a = nn.Linear(1, 1)
    model.b = model.a
    model.forward = lambda x: model.a(x)
    before = snapshot(model.a)
    functional_call(model, zeros_like(model), (torch.ones(1),))
    assert not identical(snapshot(model.a), before)

    model.a = model.b = nn.Linear(1, 1)
    model.forward = lambda x: model.a(x)
    before = snapshot(model.a)
    InterpolatedWeightRegularizer(model).backward(lambda model: model(torch.ones(1)).sum())
    assert isinstance(model.a.weight, nn.Parameter)
    assert identical(snapshot(model.a), before)


def test_functional_call_ignores_misspelt_names():
    model, x = nn.Linear(1, 1), torch.ones(1)
    assert torch.equal(functional_call(model, {"wieght": torch.zeros(1, 1)}, (x,)), model(x))
    with pytest.raises(WeightMismatchError, match=r"1 of 2 weights missing \(weight\)"):
        InterpolatedWeightRegularizer(model, anchor={"wieght": torch.zeros(1, 1), "bias": torch.zeros(1)})


def test_functional_call_moves_batch_norm_statistics():
    model, x = nn.BatchNorm1d(1), torch.tensor([[1.0], [3.0]])
    functional_call(model, dict(model.named_parameters()), (x,))
    assert model.running_mean != 0
    model.reset_running_stats()
    with torch.no_grad():
        InterpolatedWeightRegularizer(model)(x)
    assert model.running_mean == 0


def test_functional_call_refuses_the_state_dict_of_tied_weights():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[1].weight = model[0].weight
    other = {name: tensor + i for i, (name, tensor) in enumerate(model.state_dict().items())}
    with pytest.raises(ValueError, match="tied"):
        functional_call(model, other, (torch.ones(1, 2),))
    regularizer = InterpolatedWeightRegularizer(model)
    assert list(regularizer.anchor) == ["0.weight"]
    regularizer.backward(lambda model: model(torch.ones(1, 2)).sum())


def test_weights_swapped_under_autocast_are_answered_from_its_cache():
    model, x = nn.Linear(4, 4, bias=False), torch.eye(4)
    with torch.autocast("cpu", torch.bfloat16):
        own = model(x)
        backup = model.weight.detach().clone()
        model.weight.data.zero_()
        assert torch.equal(model(x), own)  # stale
        model.weight.data.copy_(backup)
        with applied(model, zeros_like(model)):
            assert model(x).abs().max() == 0


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_weights_restored_before_backward_are_not_those_of_the_recomputation(use_reentrant: bool):
    model, x = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1)).double(), torch.ones(1, 2).double()
    anchor = {n: p.detach() + 1 for n, p in model.named_parameters()}
    x.requires_grad_()

    def loss_fn(model: nn.Module) -> Tensor:
        return checkpoint(model, x, use_reentrant=use_reentrant).sum()

    def gradients_at_anchor(model: nn.Module) -> Tensor:
        exact = copy.deepcopy(model)
        exact.load_state_dict(anchor)
        exact(x).sum().backward()
        return exact[0].weight.grad

    naive = copy.deepcopy(model)
    with applied(naive, anchor):
        loss = loss_fn(naive)
    loss.backward()
    assert not torch.allclose(naive[0].weight.grad, gradients_at_anchor(model))

    class AtAnchor(InterpolatedWeightRegularizer):
        def alpha_of(self, index: int | None = None) -> float:
            return 1.0

    for strategy in ("functional", "in_place"):
        right = copy.deepcopy(model)
        AtAnchor(right, anchor=anchor, strategy=strategy).run_interpolated(lambda model: loss_fn(model).backward())
        torch.testing.assert_close(right[0].weight.grad, gradients_at_anchor(model))


def test_averaged_masks_of_infinities_and_counters_are_ruined():
    mask = torch.tensor([0.0, -torch.inf])
    assert torch.lerp(mask, mask, 0.5).isnan().any()
    assert torch.equal(patch({"mask": mask}, {"mask": mask.clone()}, anchor_weight=0.5)["mask"], mask)

    model = nn.BatchNorm1d(1)
    model.register_buffer("mask", mask)
    averager = SWAAverager(model)
    for steps in (3, 4):
        model.num_batches_tracked.fill_(steps)
        averager.update()
    with averager.applied():
        assert model.num_batches_tracked == 4  # the mean of the counters would be 3
        assert torch.equal(model.mask, mask)


def test_weights_matched_by_position_go_astray():
    theta = {"a": torch.zeros(2), "b": torch.ones(2)}
    reordered = {"b": torch.ones(2), "a": torch.zeros(2)}
    by_position = [torch.lerp(t, a, 0.5) for t, a in zip(theta.values(), reordered.values(), strict=True)]
    assert not torch.equal(by_position[0], theta["a"])
    assert identical(patch(reordered, theta, anchor_weight=0.5), theta)


def test_tied_weights_walked_through_the_state_dict_move_twice():
    def tied() -> nn.Module:
        model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
        model[1].weight = model[0].weight
        nn.init.constant_(model[0].weight, 1.0)
        return model

    model, zero = tied(), torch.zeros(1, 1)
    for tensor in model.state_dict().values():
        tensor.lerp_(zero, 0.5)
    assert model[0].weight.item() == 0.25
    model = tied()
    with applied(model, patch({"0.weight": zero}, trainable_weights(model), anchor_weight=0.5)):
        assert model[1].weight.item() == 0.5


def test_a_running_mean_in_half_precision_drifts():
    torch.manual_seed(0)
    model = nn.Linear(64, 64, bias=False).bfloat16()
    averager, exact, naive = SWAAverager(model), torch.zeros(64, 64).double(), torch.zeros(64, 64).bfloat16()
    for n in range(300):
        with torch.no_grad():
            model.weight.copy_(1 + 0.01 * torch.randn(64, 64))
        averager.update()
        exact += model.weight.detach().double() / 300
        naive = naive + (model.weight.detach() - naive) / (n + 1)
    kept = averager.weights["weight"].double()
    assert (naive.double() - exact).abs().mean() > 100 * (kept - exact).abs().mean()


def test_alpha_does_not_come_from_a_global_generator():
    model = nn.Linear(1, 1)
    torch.manual_seed(1)
    first = InterpolatedWeightRegularizer(model).alpha
    torch.manual_seed(2)
    assert InterpolatedWeightRegularizer(model).alpha == first
