import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_modules import identical, modules, moved, snapshot
from torch import nn

from interpolate import WeightMismatchError, patch, slerp, task_arithmetic, uniform_soup
from interpolate.patching import mix
from interpolate.weights import trainable_weights

ratios = st.floats(0, 1)


@given(modules())
def test_the_ends_are_exact(model: nn.Module):
    anchor, theta = model, moved(model)
    assert identical(patch(anchor, theta, anchor_weight=0), snapshot(theta))
    assert identical(patch(anchor, theta, anchor_weight=1), snapshot(anchor))


@given(modules(), ratios)
def test_inputs_are_never_modified_and_never_shared(model: nn.Module, anchor_weight: float):
    anchor, theta = snapshot(model), snapshot(moved(model))
    before = {n: t.clone() for n, t in anchor.items()}, {n: t.clone() for n, t in theta.items()}
    for tensor in patch(anchor, theta, anchor_weight=anchor_weight).values():
        tensor.zero_()
    assert identical(anchor, before[0])
    assert identical(theta, before[1])


@given(modules(), ratios)
def test_patching_is_linear(model: nn.Module, anchor_weight: float):
    anchor, theta = model, moved(model)
    trainable = {n for n, p in model.named_parameters() if p.is_floating_point()}
    patched = patch(anchor, theta, anchor_weight=anchor_weight)
    for name, tensor in patched.items():
        if name in trainable:
            mixed = anchor_weight * anchor.state_dict()[name] + (1 - anchor_weight) * theta.state_dict()[name]
            torch.testing.assert_close(tensor, mixed, rtol=1e-12, atol=1e-12)  # float64, two roundings


@given(modules(), ratios)
def test_patching_equal_weights_changes_nothing(model: nn.Module, anchor_weight: float):
    assert identical(patch(model, snapshot(model), anchor_weight=anchor_weight), snapshot(model))


@given(modules(), ratios)
def test_a_module_loads_what_patch_returns(model: nn.Module, anchor_weight: float):
    theta = moved(model)
    patched = patch(model, theta, anchor_weight=anchor_weight)
    theta.load_state_dict(patched)
    assert identical(snapshot(theta), patched)


def test_buffers_and_integers_are_thetas():
    anchor, theta = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    theta(torch.randn(8, 2))
    for a, t in ((anchor, theta), (anchor.state_dict(), theta.state_dict())):
        patched = patch(a, t, anchor_weight=0.5)
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            assert torch.equal(patched[name], theta.state_dict()[name])


def test_all_buffers_of_modules_are_thetas():
    anchor, theta = nn.Linear(1, 1), nn.Linear(1, 1)
    for value, model in ((0.0, anchor), (2.0, theta)):
        model.register_buffer("scale", torch.tensor(value))
    assert patch(anchor, theta, anchor_weight=0.5)["scale"] == 2


def test_a_mask_of_infinities_survives():
    anchor, theta = (
        {"mask": torch.full((2, 2), -torch.inf).triu(1), "w": torch.randn(2, 2, dtype=torch.double)} for _ in "at"
    )
    assert torch.equal(patch(anchor, theta, anchor_weight=0.5)["mask"], anchor["mask"])


def test_result_has_the_dtype_of_theta():
    patched = patch({"w": torch.ones(2)}, {"w": torch.zeros(2, dtype=torch.bfloat16)}, anchor_weight=0.5)
    assert patched["w"].dtype is torch.bfloat16


@given(modules(), ratios)
def test_each_pattern_has_its_ratio(model: nn.Module, ratio: float):
    anchor, theta = snapshot(model), snapshot(moved(model))
    patched = patch(anchor, theta, anchor_weight={"0.weight": 1, "0.*": ratio, "*": 0})
    assert torch.equal(patched["0.weight"], anchor["0.weight"])
    assert torch.equal(patched["0.bias"], patch(anchor, theta, anchor_weight=ratio)["0.bias"])
    assert all(torch.equal(patched[name], theta[name]) for name in theta if not name.startswith("0."))


PARTS = {"visual.w": torch.ones(1), "text.w": torch.ones(1), "visual.norm.running_mean": torch.ones(1)}


@pytest.mark.parametrize(
    "patterns",
    [
        {"*": 0.5, "visual.*": 0.3},
        {"visual.*": 0.5, "*.w": 0.2, "text.*": 0.1},
        {"visual.w": 0.5, "visual.*": 0.3, "*": 0.2},  # what else it fits is no weight
    ],
)
def test_a_pattern_that_decides_nothing_is_refused(patterns: dict[str, float]):
    with pytest.raises(ValueError, match=r"the pattern '(visual|text)\.\*' in anchor_weight decides nothing: .* \("):
        patch(PARTS, PARTS, anchor_weight=patterns)


def test_a_pattern_that_fits_no_weight_is_refused():
    with pytest.raises(ValueError, match=r"'\*running_mean' in anchor_weight fits none of 2 weights"):
        patch(PARTS, PARTS, anchor_weight={"*running_mean": 0.5, "*": 0.3})


def test_there_may_be_no_rest():
    theta = {name: torch.zeros(1) for name in PARTS}
    patched = patch(PARTS, theta, anchor_weight={"visual.*": 0.25, "text.*": 0.5, "*": 1})
    assert {name: tensor.item() for name, tensor in patched.items() if name in ("visual.w", "text.w")} == {
        "visual.w": 0.25,
        "text.w": 0.5,
    }


@pytest.mark.parametrize("nothing", [{}, {"n": torch.tensor(1)}])
def test_nothing_can_be_mixed_only_where_something_is_given(nothing: dict):
    if nothing:
        assert patch(nothing, nothing, anchor_weight=0.5) == nothing
    else:
        with pytest.raises(ValueError, match="nothing to mix: theta holds no tensor"):
            patch(nothing, nothing, anchor_weight=0.5)
        with pytest.raises(ValueError, match="nothing to mix: no set of weights"):
            uniform_soup([])


def test_messages_call_the_sides_what_the_user_calls_them():
    one, other = {"w": torch.ones(1)}, {"w": torch.ones(2)}
    with pytest.raises(WeightMismatchError, match=r"source 1 does not match source 0: .* source 0 \(1,\)"):
        uniform_soup([one, other])
    with pytest.raises(WeightMismatchError, match="theta 1 does not match anchor"):
        task_arithmetic(one, [one, other], [1, 1])


def test_slerp_keeps_the_length_of_what_it_turns():
    a, b = torch.randn(2, 5).double()
    a, b = a / a.norm(), b / b.norm()
    for anchor_weight in (0.1, 0.5, 0.9):
        mixed = slerp({"w": b}, {"w": a}, anchor_weight=anchor_weight)["w"]
        torch.testing.assert_close(mixed.norm().item(), 1.0)
        angle = torch.acos(a.dot(b))
        torch.testing.assert_close(torch.acos(mixed.dot(a)), anchor_weight * angle)


@given(modules(), st.sampled_from([0.0, 1.0]))
def test_the_ends_of_the_arc_are_exact(model: nn.Module, anchor_weight: float):
    theta = moved(model)
    expected = patch(model, theta, anchor_weight=anchor_weight)
    assert identical(slerp(model, theta, anchor_weight=anchor_weight), expected)


def test_parallel_and_zero_tensors_are_mixed_along_the_chord():
    for a, t in ((torch.ones(3), 3 * torch.ones(3)), (torch.zeros(3), torch.ones(3))):
        assert torch.equal(
            slerp({"w": a}, {"w": t}, anchor_weight=0.5)["w"], patch({"w": a}, {"w": t}, anchor_weight=0.5)["w"]
        )


@given(modules(), st.floats(-1, 2))
def test_one_task_vector_is_a_patch_with_the_opposite_coefficient(model: nn.Module, scale: float):
    theta, trainable = moved(model), trainable_weights(model)
    edited = task_arithmetic(model, [theta], [scale])
    for name, p in trainable.items():
        expected = p + scale * (theta.state_dict()[name] - p)
        torch.testing.assert_close(edited[name], expected.detach(), rtol=1e-12, atol=1e-12)


def test_task_vectors_add_up_and_cancel():
    anchor, a, b = ({"w": torch.tensor([value])} for value in (1.0, 2.0, 5.0))
    assert task_arithmetic(anchor, [a, b], [1, 0.5])["w"].item() == 4
    assert task_arithmetic(anchor, [a, a], [1, -1])["w"].item() == 1


@pytest.mark.parametrize("scales", [[1.0], [1.0, float("nan")]])
def test_scales_must_be_finite_and_one_for_each_task(scales: list[float]):
    w = {"w": torch.ones(1)}
    with pytest.raises(ValueError, match="scales must be 2 finite numbers"):
        task_arithmetic(w, [w, w], scales)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_soup_of_very_many_does_not_freeze(dtype: torch.dtype):
    early, late = ({"w": torch.tensor([value], dtype=dtype)} for value in (1.0, 1.001))
    soup = uniform_soup([early] * 1_000 + [late] * 49_000)["w"]
    exact = (early["w"].double() + 49 * late["w"].double()) / 50
    torch.testing.assert_close(soup, exact.to(dtype), rtol=1e-10, atol=0)  # the same float32


@given(modules(), st.integers(1, 4))
def test_a_uniform_soup_is_the_mean(model: nn.Module, n: int):
    sources = [moved(model) for _ in range(n)]
    soup = uniform_soup(sources)
    for name in trainable_weights(model):
        mean = torch.stack([source.state_dict()[name] for source in sources]).mean(0)
        torch.testing.assert_close(soup[name], mean, rtol=1e-12, atol=1e-12)


def test_an_unknown_operation_is_refused():
    with pytest.raises(ValueError, match="unknown operation 'blend' in a recipe"):
        mix([{"w": torch.ones(1)}], {"operation": "blend"})


@pytest.mark.parametrize("anchor_weight", [-0.1, 1.1, float("nan"), float("inf")])
def test_an_anchor_weight_outside_its_range_is_refused(anchor_weight: float):
    with pytest.raises(ValueError, match=rf"anchor_weight .* must be in \[0, 1\], got {anchor_weight}"):
        patch({"w": torch.ones(1)}, {"w": torch.ones(1)}, anchor_weight=anchor_weight)


@given(modules(), st.floats(-3, 4))
def test_patching_goes_on_beyond_both_ends_where_it_is_asked_to(model: nn.Module, anchor_weight: float):
    anchor, theta = model.double(), moved(model).double()
    patched = patch(anchor, theta, anchor_weight=anchor_weight, extrapolate=True)
    for name, p in trainable_weights(theta).items():
        expected = anchor_weight * anchor.get_parameter(name) + (1 - anchor_weight) * p
        torch.testing.assert_close(patched[name], expected, rtol=1e-9, atol=1e-9)  # of large numbers


@pytest.mark.parametrize("anchor_weight", [float("nan"), float("-inf"), {"w": float("inf")}, 1e39])
def test_what_is_beyond_the_ends_must_be_finite(anchor_weight: float | dict):
    message = r"is the weight of the anchor and must be finite, in float32 too, got (nan|-?inf|1e\+39)"
    with pytest.raises(ValueError, match=message):
        patch({"w": torch.ones(1)}, {"w": torch.ones(1)}, anchor_weight=anchor_weight, extrapolate=True)


def test_nan_is_named_and_counted():
    theta = {"w": torch.tensor([1.0, torch.nan, torch.nan])}
    with pytest.raises(ValueError, match="w has 2 values that are not finite"):
        patch({"w": torch.ones(3)}, theta, anchor_weight=0.5)


@pytest.mark.filterwarnings("ignore:.*[Ss]parse")
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.ones(2, dtype=np.float32), "'w' of anchor is ndarray, not a tensor"),
        ([1.0, 1.0], "'w' of anchor is list, not a tensor"),
        (torch.ones(2, device="meta"), "'w' of anchor is a tensor of the kind meta, without values"),
        (torch.ones(2).to_sparse(), "'w' of anchor is a tensor of the kind sparse_coo"),
    ],
)
def test_what_is_no_dense_tensor_is_named(value, message: str):
    with pytest.raises(ValueError, match=message):
        patch({"w": value}, {"w": torch.zeros(2)}, anchor_weight=0.5)


def test_names_must_match():
    with pytest.raises(WeightMismatchError, match=r"1 of 1 weights missing \(v\)"):
        patch({"w": torch.ones(1)}, {"v": torch.ones(1)}, anchor_weight=0.5)
