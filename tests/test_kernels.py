import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from interpolate.kernels import (
    EMA,
    Beta,
    Exponential,
    ExponentialOfRun,
    Gaussian,
    Kernel,
    OfRun,
    Power,
    RunningKernel,
    Uniform,
    parse_kernel,
)

KERNELS: list[Kernel] = [
    Uniform(),
    EMA(0.9),
    EMA(0.9, warmup=True),
    EMA(0),
    Exponential(3),
    Exponential(1e-4),
    ExponentialOfRun(0.1),
    Power(-0.5),
    Power(0),
    Power(6.94),
    Power(2000),
    Gaussian(15, 10),
    Gaussian(500, 0.1),
    Gaussian(-500, 0.1),
    Beta(0.5, 0.5),
    Beta(3, 2),
]

with_all = pytest.mark.parametrize("kernel", KERNELS, ids=repr)


def normalised(weights: list[float]) -> Tensor:
    tensor = torch.tensor(weights, dtype=torch.float64)
    return tensor / tensor.sum()


def running(kernel: Kernel, n: int) -> Tensor:
    """The weights that a running average along n snapshots comes to, by its recurrence."""
    follow = kernel.over(n) if isinstance(kernel, OfRun) else kernel
    assert isinstance(follow, RunningKernel)
    shares = torch.ones(1, dtype=torch.float64)
    for i in range(2, n + 1):
        weight = follow.weight(i, 1.0)
        shares = torch.cat([shares, torch.tensor([weight], dtype=torch.float64)]) / (1 + weight)
    return shares


@with_all
def test_the_running_form_comes_to_the_weights(kernel: Kernel):
    for n in (1, 2, 3, 22, 100):
        weights = kernel.weights(n)
        assert weights.dtype is torch.float64
        assert weights.shape == (n,)
        assert abs(weights.sum().item() - 1) < 1e-12
        torch.testing.assert_close(running(kernel, n), weights, rtol=1e-9, atol=1e-12)


@with_all
def test_the_running_form_is_homogeneous(kernel: Kernel):
    follow = kernel.over(20) if isinstance(kernel, OfRun) else kernel
    assert isinstance(follow, RunningKernel)
    for n in (2, 20):
        assert follow.weight(n, 8.0) == 8 * follow.weight(n, 1.0)


def test_equal_weights_are_exactly_equal_however_many():
    assert all(Uniform().weight(n + 1, float(n)) == 1 for n in range(1, 3000))
    assert Uniform().weights(3).tolist() == [1 / 3] * 3


@given(st.floats(0, 0.999), st.booleans(), st.integers(1, 40))
def test_ema_is_the_recurrence_that_begins_with_the_first(decay: float, warmup: bool, n: int):
    expected = torch.ones(1, dtype=torch.float64)
    for i in range(1, n):
        d = min(decay, (1 + i) / (10 + i)) if warmup else decay
        expected = torch.cat([d * expected, torch.tensor([1 - d], dtype=torch.float64)])
    torch.testing.assert_close(EMA(decay, warmup).weights(n), expected, rtol=1e-9, atol=1e-15)


@given(st.floats(0.1, 1000), st.integers(1, 50))
def test_exponential_weights_halve_with_every_half_life(half_life: float, n: int):
    expected = normalised([2 ** (-(n - i) / half_life) for i in range(1, n + 1)])
    torch.testing.assert_close(Exponential(half_life).weights(n), expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(ExponentialOfRun(half_life / n).weights(n), expected, rtol=1e-9, atol=0)


@given(st.floats(0.02, 0.28), st.integers(1, 50))
def test_power_is_the_average_of_edm2(width: float, n: int):
    exponent = np.roots([1, 7, 16 - width**-2, 12 - width**-2]).real.max()  # EDM2's own way to it
    assert Power.of_width(width).exponent == pytest.approx(exponent, rel=1e-9)
    expected = torch.ones(1, dtype=torch.float64)
    for t in range(2, n + 1):
        beta = (1 - 1 / t) ** (exponent + 1)
        expected = torch.cat([beta * expected, torch.tensor([1 - beta], dtype=torch.float64)])
    torch.testing.assert_close(Power.of_width(width).weights(n), expected, rtol=1e-6, atol=1e-15)


def test_the_width_of_a_power_average_is_that_of_its_weights():
    n = 20_000
    t = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    for width in (0.05, 0.1, 12**-0.5):
        weights = Power.of_width(width).weights(n)
        mean = weights @ t
        assert (weights @ (t - mean).square()).sqrt().item() == pytest.approx(width, rel=1e-4)
    torch.testing.assert_close(Power.of_width(12**-0.5).weights(5), Uniform().weights(5))


def test_one_minus_sqrt_is_where_a_decayed_learning_rate_would_have_led():
    torch.manual_seed(0)
    updates = torch.randn(10, dtype=torch.float64)  # with a constant learning rate, from 0
    decay = 1 - (torch.arange(10, dtype=torch.float64) / 10).sqrt()
    snapshots = torch.cat([torch.zeros(1, dtype=torch.float64), updates.cumsum(0)])
    n = (
        len(snapshots) - 1
    )  # the last weighs nothing at full decay: as many snapshots as decayed steps, from the first on
    merged = parse_kernel("1-sqrt").weights(n) @ snapshots[:n]
    torch.testing.assert_close(merged, decay[1:] @ updates[: n - 1])


def test_gaussian_weights_are_those_over_epochs():
    expected = normalised([math.exp(-(((i - 15) / 10) ** 2) / 2) for i in range(1, 23)])
    torch.testing.assert_close(Gaussian(15, 10).weights(22), expected)


@given(st.floats(0.1, 10), st.floats(0.1, 10), st.integers(1, 50))
def test_beta_weights_are_its_density_at_the_middle_of_each_snapshot(a: float, b: float, n: int):
    first, second = torch.tensor([a, b], dtype=torch.float64)
    density = torch.distributions.Beta(first, second)
    expected = normalised(density.log_prob((torch.arange(n, dtype=torch.float64) + 0.5) / n).exp().tolist())
    torch.testing.assert_close(Beta(a, b).weights(n), expected, rtol=1e-9, atol=1e-15)


def test_a_beta_average_does_not_outlast_its_run():
    with pytest.raises(ValueError, match="snapshot 4 of a run of 3: its weight is not defined"):
        Beta(2, 2).over(3).weight(4, 1.0)


@pytest.mark.parametrize(
    ("text", "kernel"),
    [
        ("uniform", Uniform()),
        ("exponential:20", Exponential(20)),
        ("exponential:5%", ExponentialOfRun(0.05)),
        ("ema:0.99", EMA(0.99)),
        ("power:0.1", Power.of_width(0.1)),
        ("1-sqrt", Power(-0.5)),
        ("gaussian:15,10", Gaussian(15, 10)),
        ("beta:0.5,0.5", Beta(0.5, 0.5)),
    ],
)
def test_kernels_have_short_names(text: str, kernel: Kernel):
    assert parse_kernel(text) == kernel


@pytest.mark.parametrize("text", ["", "cubic", "power", "power:a", "beta:1", "uniform:1", "power:5%", "exponential:%"])
def test_what_is_no_kernel_is_refused_with_those_that_are(text: str):
    with pytest.raises(ValueError, match=rf"'{text}' is no averaging kernel\. There are uniform, exponential:20"):
        parse_kernel(text)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EMA(1.0), r"decay must be in \[0, 1\), got 1\.0"),
        (lambda: Exponential(0), "half_life must be positive and finite, got 0"),
        (lambda: ExponentialOfRun(math.nan), "half_life must be positive and finite, got nan"),
        (lambda: Power(-1), "exponent must be above -1 and finite, got -1"),
        (lambda: Power.of_width(0.3), r"width must be above 0 and at most 0\.2887, that of equal weights; got 0\.3"),
        (lambda: parse_kernel("power:7"), r"width must be above 0 and at most 0\.2887, that of equal weights; got 7"),
        (lambda: Gaussian(math.inf, 1), "mean must be finite, got inf"),
        (lambda: Gaussian(1, 0), "std must be positive and finite, got 0"),
        (lambda: Beta(0, 1), "a must be positive and finite, got 0"),
        (lambda: Beta(1, -1), "b must be positive and finite, got -1"),
        (lambda: Power(1).weights(0), "number of snapshots must be at least 1, got 0"),
        (lambda: Beta(1, 1).over(0), "number of snapshots must be at least 1, got 0"),
    ],
)
def test_arguments_outside_their_range_are_refused(make, message: str):
    with pytest.raises(ValueError, match=message):
        make()
