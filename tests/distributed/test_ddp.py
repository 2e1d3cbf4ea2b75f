import copy
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from two_ranks import WORLD_SIZE, on_two_ranks

from interpolate import InterpolatedWeightRegularizer, SWAAverager
from interpolate.weights import trainable_weights

F = nn.functional


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 7), nn.Tanh(), nn.Linear(7, 3)).double()


def batch_of(rank: int, step: int = 0) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1000 * step + rank)
    return torch.randn(4, 5).double(), torch.randn(4, 3).double()


def joined(step: int = 0) -> tuple[Tensor, Tensor]:
    parts = [batch_of(rank, step) for rank in range(WORLD_SIZE)]
    return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])


def mse(x: Tensor, y: Tensor):
    return lambda model: F.mse_loss(model(x), y)


def anchor() -> dict[str, Tensor]:
    return trainable_weights(network(seed=1))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n.removeprefix("module."): p.grad for n, p in model.named_parameters() if p.grad is not None}


def check_same_as_single_process(rank: int, build=network, steps: int = 3, **options) -> None:
    """Some steps under DDP leave the weights of a single process that sees the joined batches."""
    single = build()
    reference = InterpolatedWeightRegularizer(single, anchor=trainable_weights(build(seed=1)), alpha_per_rank=False)
    ddp = DistributedDataParallel(build(), **options.pop("ddp", {}))
    regularizer = InterpolatedWeightRegularizer(
        ddp, anchor=trainable_weights(build(seed=1)), alpha_per_rank=False, **options
    )
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (single, ddp)]
    for step in range(steps):
        assert regularizer.alpha == reference.alpha
        reference.backward(mse(*joined(step)))
        regularizer.backward(mse(*batch_of(rank, step)))
        torch.testing.assert_close(gradients(ddp), gradients(single))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def ddp_gradients_are_those_of_a_single_process_on_the_joined_batch(rank: int) -> None:
    check_same_as_single_process(rank)


def ddp_in_place_is_right_too(rank: int) -> None:
    check_same_as_single_process(rank, strategy="in_place")


def ddp_with_static_graph_is_right(rank: int) -> None:
    check_same_as_single_process(rank, ddp={"static_graph": True})


def ddp_with_gradients_as_views_of_buckets_is_right(rank: int) -> None:
    check_same_as_single_process(rank, ddp={"gradient_as_bucket_view": True})


class WithUnused(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.used, self.unused = network(seed), nn.Linear(2, 2).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def ddp_that_looks_for_unused_parameters_is_right(rank: int) -> None:
    check_same_as_single_process(rank, WithUnused, ddp={"find_unused_parameters": True})
    check_same_as_single_process(rank, WithUnused, ddp={"find_unused_parameters": True}, strategy="in_place")


class Twice(nn.Module):
    """One submodule under two names."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.body = network(seed)
        self.head = self.body[4]

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def ddp_of_a_submodule_under_two_names_is_right(rank: int) -> None:
    check_same_as_single_process(rank, Twice)
    check_same_as_single_process(rank, Twice, ddp={"static_graph": True})


def swapping_in_place_with_a_static_graph_is_refused(rank: int) -> None:
    with pytest.raises(ValueError, match=r"static_graph=True would leave gradients unsynchronised \(as asked\)"):
        InterpolatedWeightRegularizer(DistributedDataParallel(network(), static_graph=True), strategy="in_place")


class Checkpointed(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.layers = network(seed)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False)
        return x


def ddp_with_checkpointing_is_right(rank: int) -> None:
    check_same_as_single_process(rank, Checkpointed)
    check_same_as_single_process(rank, Checkpointed, strategy="in_place")


def ddp_of_adapters_is_right(rank: int) -> None:
    peft = pytest.importorskip("peft")

    def adapted(seed: int = 0) -> nn.Module:
        config = peft.LoraConfig(target_modules=["0", "2"], r=2, lora_alpha=3)
        model = peft.get_peft_model(network(), config).double()
        torch.manual_seed(seed)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_" in name:
                    p.copy_(torch.randn_like(p))
        return model

    for ddp in ({}, {"gradient_as_bucket_view": True}, {"static_graph": True}):
        single, wrapped = adapted(), DistributedDataParallel(adapted(), **ddp)
        reference = InterpolatedWeightRegularizer(single, alpha_per_rank=False)
        regularizer = InterpolatedWeightRegularizer(wrapped, alpha_per_rank=False)
        optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (single, wrapped)]
        for step in range(3):
            reference.backward(mse(*joined(step)))
            regularizer.backward(mse(*batch_of(rank, step)))
            assert len(gradients(single)) == 4
            torch.testing.assert_close(gradients(wrapped), gradients(single))
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=step == 0)


def every_rank_draws_its_alpha_and_gradients_are_their_mean(rank: int) -> None:
    ddp = DistributedDataParallel(network())
    regularizer = InterpolatedWeightRegularizer(ddp, anchor=anchor())
    alphas: list = [None] * WORLD_SIZE
    dist.all_gather_object(alphas, regularizer.alpha)
    assert len(set(alphas)) == WORLD_SIZE

    single = network()
    reference = InterpolatedWeightRegularizer(single, anchor=anchor())
    with reference.one_step():
        for other in range(WORLD_SIZE):
            assert reference.alpha_of(other) == alphas[other]
            reference.backward(mse(*batch_of(other)), index=other)
    regularizer.backward(mse(*batch_of(rank)))
    torch.testing.assert_close(gradients(ddp), {n: g / WORLD_SIZE for n, g in gradients(single).items()})


def micro_batches_have_the_alphas_of_their_indices_on_any_number_of_ranks(rank: int) -> None:
    single, ddp = network(), DistributedDataParallel(network())
    reference = InterpolatedWeightRegularizer(single, anchor=anchor(), alpha_per_rank=False)
    regularizer = InterpolatedWeightRegularizer(ddp, anchor=anchor())
    of_rank = range(rank, 4, WORLD_SIZE)
    for step in range(2):
        with reference.one_step():
            for index in range(4):
                reference.backward(mse(*batch_of(index, step)), index=index)
        with regularizer.one_step():
            with ddp.no_sync():
                regularizer.backward(mse(*batch_of(of_rank[0], step)), index=of_rank[0])
            regularizer.backward(mse(*batch_of(of_rank[1], step)), index=of_rank[1])
        torch.testing.assert_close(gradients(ddp), {n: g / WORLD_SIZE for n, g in gradients(single).items()})


def a_regularizer_made_before_the_process_group_draws_by_rank_all_the_same(rank: int) -> None:
    group, dist.is_initialized = dist.is_initialized, lambda: False
    try:
        early = InterpolatedWeightRegularizer(network())
        shared = InterpolatedWeightRegularizer(network(), alpha_per_rank=False, seed=rank)
    finally:
        dist.is_initialized = group
    assert early.alpha == early.alpha_of(rank)
    assert shared.alpha == shared.alpha_of(0)
    with pytest.raises(ValueError, match=r"seed must be the same on every rank where they share alpha, got \[0, 1\]"):
        shared.backward(mse(*batch_of(rank)))
    shared.seed = 3
    shared.backward(mse(*batch_of(rank)))


class AllReduces(TorchDispatchMode):
    """Counts them, DDP's and all others; a profiler loses what ends as it stops."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket is torch.ops.c10d.allreduce_
        return function(*args, **(kwargs or {}))


def all_reduces_of(step) -> int:
    with AllReduces() as all_reduces:
        step()
    return all_reduces.count


def an_iwr_step_costs_the_all_reduces_of_a_plain_step(rank: int) -> None:
    ddp, loss_fn = DistributedDataParallel(network(), bucket_cap_mb=0.0002), mse(*batch_of(rank))  # several buckets
    for _ in range(2):
        loss_fn(ddp).backward()  # DDP puts its buckets in order after the first step
    plain = all_reduces_of(lambda: loss_fn(ddp).backward())
    assert plain > 1
    for strategy in ("functional", "in_place"):
        regularizer = InterpolatedWeightRegularizer(ddp, anchor=anchor(), strategy=strategy)
        assert all_reduces_of(partial(regularizer.backward, loss_fn)) == plain


def gradients_accumulate_without_synchronisation(rank: int) -> None:
    for strategy in ("functional", "in_place"):
        single, ddp = network(), DistributedDataParallel(network())
        reference = InterpolatedWeightRegularizer(single, anchor=anchor(), alpha_per_rank=False)
        regularizer = InterpolatedWeightRegularizer(ddp, anchor=anchor(), alpha_per_rank=False, strategy=strategy)
        for step in range(3):
            reference.backward(mse(*joined(step)))
        with ddp.no_sync():
            assert all_reduces_of(partial(regularizer.backward, mse(*batch_of(rank, 0)))) == 0
            regularizer.backward(mse(*batch_of(rank, 1)))
        regularizer.backward(mse(*batch_of(rank, 2)))
        torch.testing.assert_close(gradients(ddp), gradients(single))


def batch_norm_buffers_are_those_of_a_plain_step(rank: int) -> None:
    def normalized() -> nn.Module:
        return nn.Sequential(network(), nn.BatchNorm1d(3), nn.Linear(3, 3)).double()

    x, y = batch_of(rank)
    for strategy in ("functional", "in_place"):
        plain, ddp = (DistributedDataParallel(normalized(), broadcast_buffers=True) for _ in range(2))
        regularizer = InterpolatedWeightRegularizer(ddp, strategy=strategy)
        for _ in range(2):
            mse(x, y)(plain).backward()
            regularizer.backward(mse(x, y))
        for (name, buffer), (_, expected) in zip(ddp.named_buffers(), plain.named_buffers(), strict=True):
            assert torch.equal(buffer, expected), name


def one_pass_estimators_synchronise(rank: int) -> None:
    for passes in ("split", "random"):
        ddp = DistributedDataParallel(network())
        regularizer = InterpolatedWeightRegularizer(ddp, anchor=anchor(), passes=passes)
        kinds = set()
        for step in range(8):
            regularizer.interpolated_loss = None
            regularizer.backward(lambda model, x, y: F.mse_loss(model(x), y), *batch_of(rank, step))
            kinds.add(regularizer.interpolated_loss is None)
            both: list = [None] * WORLD_SIZE
            dist.all_gather_object(both, gradients(ddp))
            torch.testing.assert_close(both[0], both[1], rtol=0, atol=0)
        assert kinds == ({False, True} if passes == "random" else {False})
    with pytest.raises(ValueError, match="strategy='functional' would be wrong: DDP synchronises"):
        InterpolatedWeightRegularizer(ddp, passes="random", strategy="functional")


def the_naive_way_under_ddp_leaves_gradients_unsynchronised(rank: int) -> None:
    ddp, (x, y) = DistributedDataParallel(network()), batch_of(rank)
    weights = {n: torch.lerp(p, anchor()[n], 0.3) for n, p in ddp.module.named_parameters()}
    F.mse_loss(torch.func.functional_call(ddp.module, weights, (x,)), y).backward()
    both: list = [None] * WORLD_SIZE
    dist.all_gather_object(both, gradients(ddp))
    assert not torch.allclose(both[0]["0.weight"], both[1]["0.weight"])


def forward_calls_are_refused_under_ddp(rank: int) -> None:
    regularizer = InterpolatedWeightRegularizer(DistributedDataParallel(network()))
    with pytest.raises(RuntimeError, match=r"model=DistributedDataParallel\. Use regularizer\.backward\(loss_fn\)"):
        regularizer(batch_of(rank)[0])


def names_carry_no_prefix_of_the_wrapper(rank: int) -> None:
    ddp = DistributedDataParallel(network())
    averager = SWAAverager(ddp)
    averager.update()
    assert list(averager.weights) == list(InterpolatedWeightRegularizer(ddp).anchor) == list(anchor())
    with averager.applied() as average:
        assert average is ddp


def a_wrapped_part_of_a_model_is_refused(rank: int) -> None:
    model = nn.Sequential(DistributedDataParallel(network()), nn.Linear(3, 3))
    with pytest.raises(ValueError, match="'0' is wrapped in DistributedDataParallel; wrap the whole model"):
        InterpolatedWeightRegularizer(model)


def an_exception_under_ddp_leaves_the_model_as_it_was(rank: int) -> None:
    for strategy in ("functional", "in_place"):
        ddp = DistributedDataParallel(network())
        regularizer = InterpolatedWeightRegularizer(ddp, anchor=anchor(), strategy=strategy)
        before = copy.deepcopy(ddp.module.state_dict())

        def failing(model: nn.Module) -> Tensor:
            model(batch_of(0)[0])
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            regularizer.backward(failing)
        torch.testing.assert_close(ddp.module.state_dict(), before, rtol=0, atol=0)


test_two_ranks = on_two_ranks(__name__)
