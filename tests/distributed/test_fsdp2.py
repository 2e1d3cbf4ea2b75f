import copy

import pytest
import torch
import torch.distributed as dist
from random_modules import snapshot
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.utils.checkpoint import checkpoint
from two_ranks import DEVICE, WORLD_SIZE, on_two_ranks

from interpolate import InterpolatedWeightRegularizer, load_weights, patch, pull
from interpolate._sharding import reshard
from interpolate.weights import applied, trainable_weights

F = nn.functional
WIDTHS = 5, 7, 1  # odd, and fewer rows than ranks: uneven shards, an empty one among them


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    first, second, last = WIDTHS
    return nn.Sequential(
        nn.Linear(first, second), nn.Tanh(), nn.Linear(second, second), nn.Tanh(), nn.Linear(second, last)
    ).double()


def sharded(model: nn.Module, **options) -> nn.Module:
    mesh = init_device_mesh(DEVICE, (WORLD_SIZE,))
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def batch_of(rank: int, step: int = 0) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1000 * step + rank)
    return torch.randn(4, WIDTHS[0]).double(), torch.randn(4, WIDTHS[-1]).double()


def joined(step: int = 0) -> tuple[Tensor, Tensor]:
    parts = [batch_of(rank, step) for rank in range(WORLD_SIZE)]
    return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])


def mse(x: Tensor, y: Tensor):
    return lambda model: F.mse_loss(model(x), y)


def full(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in tensors.items()}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return full({n: p.grad for n, p in model.named_parameters() if p.grad is not None})


def anchor() -> dict[str, Tensor]:
    return {n: p.detach() for n, p in network(seed=1).named_parameters()}


def check_same_as_single_process(rank: int, model: nn.Module, loss_of=mse, evaluate: bool = False) -> None:
    single = network()
    reference = InterpolatedWeightRegularizer(single, anchor=anchor(), alpha_per_rank=False)
    regularizer = InterpolatedWeightRegularizer(model, anchor=anchor())
    assert regularizer.strategy == "in_place"
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (single, model)]
    for step in range(3):
        if evaluate:
            with torch.no_grad():
                model(batch_of(rank)[0])  # leaves gathered parameters behind
        reference.backward(mse(*joined(step)))
        regularizer.backward(loss_of(*batch_of(rank, step)))
        reshard(model)  # the gradients are those of the shards
        torch.testing.assert_close(gradients(model), gradients(single))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert all(isinstance(tensor, DTensor) for tensor in regularizer.anchor.values())
    torch.testing.assert_close(full(regularizer.anchor), anchor(), rtol=0, atol=0)


def fsdp2_gradients_are_those_of_a_single_process_on_the_joined_batch(rank: int) -> None:
    check_same_as_single_process(rank, sharded(network()))


def fsdp2_is_right_after_an_evaluation(rank: int) -> None:
    check_same_as_single_process(rank, sharded(network()), evaluate=True)


def fsdp2_is_right_when_it_keeps_gathered_weights(rank: int) -> None:
    model = sharded(network(), reshard_after_forward=False)
    model.set_reshard_after_backward(False)
    check_same_as_single_process(rank, model, evaluate=True)


def fsdp2_with_checkpointing_is_right(rank: int) -> None:
    def loss_of(x: Tensor, y: Tensor):
        return lambda model: F.mse_loss(checkpoint(model, x, use_reentrant=False), y)

    check_same_as_single_process(rank, sharded(network()), loss_of)


def all_ranks_share_alpha_where_weights_are_sharded(rank: int) -> None:
    model = sharded(network())
    alphas: list = [None] * WORLD_SIZE
    dist.all_gather_object(alphas, InterpolatedWeightRegularizer(model).alpha)
    assert alphas[0] == alphas[1]
    with pytest.raises(ValueError, match="alpha_per_rank=True is wrong where weights are sharded"):
        InterpolatedWeightRegularizer(model, alpha_per_rank=True)
    with pytest.raises(ValueError, match=r"seed must be the same on every rank where they share alpha, got \[0, 1\]"):
        InterpolatedWeightRegularizer(model, seed=rank)


def the_functional_strategy_is_refused_with_the_reason(rank: int) -> None:
    with pytest.raises(ValueError, match=r"ignores the weights given for sharded parameters \(0\.weight, 0\.bias"):
        InterpolatedWeightRegularizer(sharded(network()), strategy="functional")


def the_naive_functional_call_on_fsdp2_ignores_the_weights(rank: int) -> None:
    model, (x, _) = sharded(network()), batch_of(rank)
    own = model(x)
    zeros = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    assert torch.equal(torch.func.functional_call(model, zeros, (x,)), own)


def forward_calls_are_refused_for_sharded_weights(rank: int) -> None:
    with pytest.raises(RuntimeError, match=r"here strategy='in_place'.*Use regularizer\.backward\(loss_fn\)"):
        InterpolatedWeightRegularizer(sharded(network()))(batch_of(rank)[0])


def shards_are_restored_after_an_exception(rank: int) -> None:
    model = sharded(network())
    regularizer = InterpolatedWeightRegularizer(model, anchor=anchor())
    before = copy.deepcopy(full(model.state_dict()))

    def failing(model: nn.Module) -> Tensor:
        model(batch_of(rank)[0])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        regularizer.backward(failing)
    torch.testing.assert_close(full(trainable_weights(model)), before, rtol=0, atol=0)


def shards_that_move_during_a_pass_are_restored_where_they_are(rank: int) -> None:
    model = sharded(network())
    model(batch_of(rank)[0])
    reshard(model)
    before = copy.deepcopy(full(model.state_dict()))

    def moving(_: nn.Module) -> None:  # as FSDP2 does in its first pass, where it pads shards or pins them
        for p in model.parameters():
            p._local_tensor = p._local_tensor.clone()

    regularizer = InterpolatedWeightRegularizer(model, anchor=anchor())
    regularizer.run_interpolated(moving)
    torch.testing.assert_close(full(trainable_weights(model)), before, rtol=0, atol=0)
    regularizer.run_at_anchor(moving)
    torch.testing.assert_close(full(trainable_weights(model)), before, rtol=0, atol=0)
    with applied(model, anchor()):
        moving(model)
    torch.testing.assert_close(full(trainable_weights(model)), before, rtol=0, atol=0)


def one_pass_estimators_run_on_shards(rank: int) -> None:
    for passes in ("split", "random"):
        model = sharded(network())
        regularizer = InterpolatedWeightRegularizer(model, anchor=anchor(), passes=passes)
        for step in range(4):
            regularizer.backward(lambda model, x, y: F.mse_loss(model(x), y), *batch_of(rank, step))
        assert all(g.isfinite().all() for g in gradients(model).values())


def a_regularizer_resumes_on_shards(rank: int) -> None:
    first = InterpolatedWeightRegularizer(sharded(network()), anchor=anchor(), seed=3)
    first.backward(mse(*batch_of(rank)))
    second = InterpolatedWeightRegularizer(sharded(network()))
    for state in (first.state_dict(), {**first.state_dict(), "anchor": full(first.anchor)}):
        second.load_state_dict(state)
    assert second.alpha == first.alpha
    torch.testing.assert_close(full(second.anchor), anchor(), rtol=0, atol=0)


def a_model_sharded_after_its_regularizer_was_made_is_refused(rank: int) -> None:
    model = network()
    regularizer = InterpolatedWeightRegularizer(model)
    sharded(model)
    with pytest.raises(RuntimeError, match="sharded since the regularizer was made; make it after fully_shard"):
        regularizer.backward(mse(*batch_of(rank)))


def sharded_weights_can_be_loaded_whole_or_in_other_shards(rank: int) -> None:
    model, whole = sharded(network()), network(seed=1)
    load_weights(whole, trainable_weights(model))
    torch.testing.assert_close(snapshot(whole), snapshot(network()), rtol=0, atol=0)
    replicated = {n: p.detach().redistribute(placements=[Replicate()]) for n, p in model.named_parameters()}
    other = sharded(network(seed=1))
    load_weights(other, replicated)
    torch.testing.assert_close(full(trainable_weights(other)), snapshot(network()), rtol=0, atol=0)


def whole_weights_can_be_applied_to_shards(rank: int) -> None:
    model, (x, _) = sharded(network()), batch_of(rank)
    with torch.no_grad():
        own = model(x)
        with applied(model, anchor()):
            torch.testing.assert_close(model(x), network(seed=1)(x), rtol=0, atol=0)
        torch.testing.assert_close(model(x), own, rtol=0, atol=0)


def shards_are_pulled_in_place_toward_whole_weights_and_others(rank: int) -> None:
    model, (x, _) = sharded(network()), batch_of(rank)
    with torch.no_grad():
        model(x)  # leaves gathered weights behind
    pull(model, anchor(), weight=0.25)
    pull(model, dict(sharded(network(seed=1)).named_parameters()), weight=0.5)
    expected = network()
    pull(expected, network(seed=1), weight=0.25)
    pull(expected, network(seed=1), weight=0.5)
    for name, whole in full(dict(model.named_parameters())).items():
        torch.testing.assert_close(whole, expected.get_parameter(name), rtol=0, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected(x), rtol=0, atol=0)


def an_anchor_of_shards_moves(rank: int) -> None:
    model = sharded(network())
    regularizer = InterpolatedWeightRegularizer(model, anchor=anchor())
    regularizer.move_anchor(weight=0.25)
    moved = patch(network(), network(seed=1), anchor_weight=0.25)
    for name, whole in full(regularizer.anchor).items():
        torch.testing.assert_close(whole, moved[name], rtol=0, atol=0)


test_two_ranks = on_two_ranks(__name__)
