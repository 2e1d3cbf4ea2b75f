import itertools
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_modules import identical, modules, moved, snapshot
from torch import nn

from interpolate import (
    EMAAverager,
    KernelAverager,
    LAWAAverager,
    SWAAverager,
    WeightAverager,
    WeightMismatchError,
    patch,
)
from interpolate.kernels import EMA, Beta, Exponential, ExponentialOfRun, Gaussian, Kernel, OfRun, Power, Uniform
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


KERNELS: list[Kernel] = [
    Uniform(),
    EMA(0.9),
    Exponential(3),
    Exponential(0.05),  # the sum is scaled down at every snapshot
    ExponentialOfRun(0.1),
    Power.of_width(0.05),
    Power(-0.5),
    Gaussian(15, 4),
    Beta(0.5, 0.5),
]


@pytest.mark.parametrize("kernel", KERNELS, ids=repr)
@pytest.mark.parametrize("start_at", ["anchor", None])
def test_an_average_by_a_kernel_is_the_direct_sum(kernel: Kernel, start_at):
    n = 30
    model = nn.Linear(3, 2).double()
    averager = KernelAverager(model, kernel.over(n) if isinstance(kernel, OfRun) else kernel, start_at=start_at)
    points = [snapshot(model)] if start_at else []
    assert averager.n_averaged == len(points)
    while len(points) < n:
        model.load_state_dict(moved(model).state_dict())
        averager.update()
        points.append(snapshot(model))
    for name, average in averager.weights.items():
        stacked = torch.stack([point[name] for point in points]).flatten(1)
        direct = (kernel.weights(n) @ stacked).view_as(average)
        torch.testing.assert_close(average, direct, rtol=1e-12, atol=1e-12)  # the largest terms are about 5


def test_an_average_that_begins_at_the_anchor_is_there_at_once_and_resumes():
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 1.0)
    averager = EMAAverager(model, decay=0.75, warmup=False, start_at="anchor", start_step=1, cycle_steps=2)
    assert averager.weights["weight"].item() == 1
    for value in (7.0, 8.0, 5.0):  # the third is a snapshot
        nn.init.constant_(model.weight, value)
        averager.update()
    assert averager.weights["weight"].item() == 0.75 * 1 + 0.25 * 5
    resumed = EMAAverager(model, decay=0.75, warmup=False, start_at="anchor", start_step=1, cycle_steps=2)
    resumed.load_state_dict(averager.state_dict())  # which holds the anchor that the run began at
    assert (resumed.weights, resumed.n_averaged, resumed.step) == (averager.weights, 2, 3)
    with pytest.raises(ValueError, match="start_at must be 'anchor' or None, got 'zero'"):
        SWAAverager(model, start_at="zero")


def test_the_state_of_another_kernel_is_refused():
    model = nn.Linear(1, 1)
    SWAAverager(model).load_state_dict(KernelAverager(model, Uniform()).state_dict())
    with pytest.raises(ValueError, match=r"of KernelAverager\(Power\(exponent=1\)\), this averager is .*=2\)\)"):
        KernelAverager(model, Power(2)).load_state_dict(KernelAverager(model, Power(1)).state_dict())


def test_what_is_no_running_kernel_is_refused():
    kernels: list = [Beta(2, 2), "power:0.1"]
    with pytest.raises(ValueError, match=r"Beta\(a=2, b=2\) depends on how many .* say so: Beta\(a=2, b=2\)\.over"):
        KernelAverager(nn.Linear(1, 1), kernels[0])
    with pytest.raises(ValueError, match=r"kernel must be one of interpolate\.kernels.* got 'power:0\.1'"):
        KernelAverager(nn.Linear(1, 1), kernels[1])
    model = nn.Linear(1, 1)
    averager = KernelAverager(model, Beta(2, 2).over(1))
    averager.update()
    before = averager.state_dict()["averages"]["0"]["weight"].clone()
    with pytest.raises(ValueError, match="snapshot 2 of a run of 1"):
        averager.update()
    assert torch.equal(averager.state_dict()["averages"]["0"]["weight"], before)


@pytest.mark.parametrize("kind", FAMILY)
def test_buffers_that_a_pattern_fits_are_averaged_like_the_weights(kind):
    model = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2)).double()
    averager = kind(model, averaged_buffers=("*.running_*",))
    reference = kind(nn.ParameterDict({"mean": torch.zeros(2).double(), "var": torch.ones(2).double()}))
    for _ in range(3):
        model(torch.randn(8, 2).double())
        averager.update()
        reference.model["mean"].data.copy_(model[1].running_mean)
        reference.model["var"].data.copy_(model[1].running_var)
        reference.update()
    assert torch.equal(averager.buffers["1.running_mean"], reference.weights["mean"])
    assert torch.equal(averager.buffers["1.running_var"], reference.weights["var"])
    assert averager.buffers["1.num_batches_tracked"] == 3
    assert averager.weights.keys() == {"0.weight", "0.bias", "1.weight", "1.bias"}
    with averager.applied() as average:
        assert torch.equal(average[1].running_var, reference.weights["var"])
    resumed = kind(model, averaged_buffers=("*.running_*",))
    resumed.load_state_dict(averager.state_dict())
    for a in (averager, resumed):
        a.update()
    assert identical(resumed.buffers, averager.buffers)
    with pytest.raises(WeightMismatchError, match=r"4 of 4 weights|missing \(0\.running_mean|unexpected"):
        kind(model).load_state_dict(averager.state_dict())


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ("running_mean", r"must be a sequence of patterns, got 'running_mean': write \('running_mean',\)"),
        (["*.running_mean"], r"'\*\.running_mean' in averaged_buffers fits none of the buffers \(running_mean, "),
        (["*"], r"averaged_buffers fits num_batches_tracked \(int64\): only floating point has a mean"),
    ],
)
def test_patterns_of_buffers_that_fit_nothing_or_codes_are_refused(patterns, message: str):
    with pytest.raises(ValueError, match=message):
        SWAAverager(nn.BatchNorm1d(2), averaged_buffers=patterns)


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


class Growing(nn.Module):
    """Keeps all it has seen in one buffer, a cache as long as its longest input in another, and has an expanded one."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.register_buffer("seen", torch.zeros(0))
        self.register_buffer("scale", torch.ones(1).expand(3))
        self.register_buffer("cache", torch.zeros(0), persistent=False)
        self.longest = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen = torch.cat([self.seen, x.detach()])
        if len(x) > self.longest:
            self.longest = len(x)
            self.register_buffer("cache", torch.arange(self.longest), persistent=False)
        return self.weight * x + self.cache[: len(x)]


@pytest.mark.parametrize("kind", FAMILY)
def test_buffers_that_grow_or_are_expanded_come_and_go(kind):
    model = Growing()
    averager = kind(model)
    model(torch.tensor([1.0]))
    averager.update()
    model(torch.tensor([2.0, 3.0]))
    own, longest = dict(model.named_buffers()), model.longest
    with averager.applied():
        assert model.seen.tolist() == [1]
        assert torch.equal(model.scale, torch.ones(3))
        assert len(model.cache) == longest  # as the attribute beside it says
        model(torch.tensor([4.0, 5.0, 6.0]))
    assert model.seen.tolist() == [1, 2, 3]
    assert all(dict(model.named_buffers())[name] is own[name] for name in ("seen", "scale"))
    assert len(model.cache) == model.longest == 3

    resumed = kind(Growing())
    resumed.load_state_dict(averager.state_dict())
    assert identical(resumed.buffers, averager.buffers)
    assert resumed.buffers["seen"] is not averager.buffers["seen"]


def test_a_buffer_that_is_gone_is_named():
    model = Growing()
    averager = SWAAverager(model)
    averager.update()
    del model.seen
    with pytest.raises(WeightMismatchError, match=r"1 weights \(seen\) are not in Growing"), averager.applied():
        pass


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
        (partial(LAWAAverager, k=2.5), r"k must be a whole number, got 2\.5"),
        (partial(SWAAverager, start_step=0.7 * 1005), r"start_step must be a whole number, got 703\.5"),
        (partial(SWAAverager, start_step=float("nan")), "start_step must be a whole number, got nan"),
        (partial(SWAAverager, start_step=-1), "start_step must be at least 0, got -1"),
        (partial(SWAAverager, cycle_steps=1.5), r"cycle_steps must be a whole number, got 1\.5"),
    ],
)
def test_arguments_outside_their_range_are_refused(kind, message: str):
    with pytest.raises(ValueError, match=message):
        kind(nn.Linear(1, 1))


def test_a_model_without_values_has_no_average():
    with pytest.raises(ValueError, match=r"2 weights \(weight, bias\) are on the meta device"):
        SWAAverager(nn.Linear(1, 1, device="meta"))


def test_the_state_of_another_kind_of_average_is_refused():
    model = nn.Linear(1, 1)
    with pytest.raises(ValueError, match=r"of LAWAAverager, this averager is KernelAverager\(Uniform\(\)\)"):
        SWAAverager(model).load_state_dict(LAWAAverager(model, k=1).state_dict())
    with pytest.raises(ValueError, match="the state holds 2 sets of weights, this averager 1"):
        LAWAAverager(model, k=1).load_state_dict(LAWAAverager(model, k=2).state_dict())


def test_snapshots_are_taken_every_cycle_after_the_start():
    model = nn.Linear(1, 1)
    averager = SWAAverager(model, start_step=4, cycle_steps=3)
    counts = []
    for _ in range(11):
        averager.update()
        counts.append(averager.n_averaged)
    assert counts == [0, 0, 0, 0, 0, 0, 1, 1, 1, 2, 2]


N_POINTS = 20


def last_bits(a: torch.Tensor, b: torch.Tensor) -> int:
    """How many float32 numbers apart two tensors of positive numbers are, at most."""
    return int((a.float().view(torch.int32) - b.float().view(torch.int32)).abs().max())


def swa_coefficients(n: int) -> torch.Tensor:
    return torch.full((n,), 1 / n, dtype=torch.float64)


def ema_coefficients(n: int, decay: float) -> torch.Tensor:
    age = torch.arange(n - 1, -1, -1, dtype=torch.float64)
    coefficients = (1 - decay) * decay**age
    coefficients[0] /= 1 - decay
    return coefficients


def lawa_coefficients(n: int, k: int) -> torch.Tensor:
    return (torch.arange(n) >= n - k).double() / k


def ema(decay: float) -> tuple:
    return partial(EMAAverager, decay=decay, warmup=False), partial(ema_coefficients, decay=decay)


@pytest.mark.parametrize(
    ("kind", "coefficients", "n"),
    [
        (SWAAverager, swa_coefficients, 2_000),
        (*ema(0.9999), 2_000),
        (*ema(0.5), 2_000),  # the sum is scaled down every 60 snapshots
        (partial(LAWAAverager, k=150), partial(lawa_coefficients, k=150), 200),
        pytest.param(SWAAverager, swa_coefficients, 100_000, marks=pytest.mark.slow),
        pytest.param(*ema(0.9999), 100_000, marks=pytest.mark.slow),
    ],
)
def test_a_long_average_is_within_a_last_bit_of_the_exact_one(kind, coefficients, n: int):
    model = nn.ParameterDict({"wide": torch.ones(16), "narrow": torch.ones(16, dtype=torch.bfloat16)})
    averager = kind(model, device="cpu")
    points: dict[str, list] = {name: [] for name in model}
    for _ in range(N_POINTS):
        for name, p in model.items():
            nn.init.uniform_(p, 1, 1.1)
            points[name].append(p.detach().double())
        for _ in range(n // N_POINTS):
            averager.update()
    share = coefficients(n).view(N_POINTS, -1).sum(1)
    for name, average in averager.weights.items():
        assert average.dtype is torch.float32
        assert last_bits(average, share @ torch.stack(points[name])) <= 1


def test_a_decay_of_zero_forgets_everything():
    model = nn.Linear(1, 1, bias=False)
    averager = EMAAverager(model, decay=0, warmup=False)
    for value in (1e30, 0):
        nn.init.constant_(model.weight, value)
        averager.update()
    assert averager.weights["weight"] == 0


def test_a_long_average_that_cancels_is_as_exact_as_its_terms():
    model, n = nn.Linear(256, 1, bias=False), 2_001
    averager = SWAAverager(model)
    nn.init.uniform_(model.weight, 1, 1.1)
    for i in range(n):
        if i:
            model.weight.data.neg_()
        averager.update()
    torch.testing.assert_close(averager.weights["weight"], model.weight / n, rtol=1e-6, atol=0)  # one rounding


@pytest.mark.parametrize("kind", FAMILY)
def test_a_model_that_becomes_finer_is_averaged_as_fine_from_then_on(kind):
    model = nn.Linear(1, 1, bias=False).half()
    averager = kind(model)
    for dtype in (torch.float16, torch.float64):
        model.to(dtype)
        nn.init.constant_(model.weight, 1 + 2**-40)
        averager.update()
    share = 9 / 11 if isinstance(averager, EMAAverager) else 1 / 2  # warm-up: a decay of 2 / 11
    expected = torch.tensor([[1 + share * 2**-40]], dtype=torch.float64)
    torch.testing.assert_close(averager.weights["weight"], expected, rtol=1e-15, atol=0)
    resumed = kind(nn.Linear(1, 1, bias=False).half())
    resumed.load_state_dict(averager.state_dict())
    resumed.model.double()
    nn.init.constant_(resumed.model.weight, 1 + 2**-40)
    averager.update()
    resumed.update()
    assert identical(resumed.weights, averager.weights)


@pytest.mark.parametrize("shape", [(), (0, 3), (3, 0), (5, 7), (200_003,), (3, 70_000)])
def test_weights_of_every_size_and_stride_are_summed(shape: tuple[int, ...]):
    strided = torch.randn(shape[::-1]).permute(tuple(range(len(shape)))[::-1])
    model = nn.ParameterDict({"plain": torch.randn(shape), "strided": strided})
    averager = SWAAverager(model)
    points = []
    for _ in range(2):
        points.append({name: p.detach().clone() for name, p in model.items()})
        averager.update()
        for p in model.values():
            nn.init.normal_(p)
    for name, average in averager.weights.items():
        assert torch.equal(average, ((points[0][name].double() + points[1][name].double()) / 2).float())


def test_the_average_that_was_read_does_not_change_with_the_next_update():
    model = nn.Linear(1, 1)
    averager = SWAAverager(model)
    averager.update()
    read = averager.weights
    before = {name: tensor.clone() for name, tensor in read.items()}
    nn.init.constant_(model.weight, 7)
    averager.update()
    assert identical(read, before)


def test_a_device_without_float64_is_told_about_device_cpu():
    with pytest.raises(ValueError, match=r"float64, which is not to be had on 'mps': .*device='cpu'"):
        SWAAverager(nn.Linear(1, 1), device="mps")


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


def test_factors_of_an_adapter_are_refused_with_their_layers():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(nn.Sequential(nn.Linear(4, 4)), peft.LoraConfig(target_modules=["0"]))
    with pytest.raises(ValueError, match=r"adapter \(such as LoRA\) in base_model\.model\.0: .* Merge first"):
        SWAAverager(model)
