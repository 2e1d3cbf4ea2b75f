import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_modules import batch, identical, modules, moved, snapshot
from torch import nn

from interpolate import WeightMismatchError, applied, load_weights, patch
from interpolate.weights import check_match, lerp, trainable_weights


def test_a_mismatch_lists_names_and_shapes():
    theta = {"a": torch.zeros(2), "b": torch.zeros(3), "c": torch.zeros(1)}
    anchor = {"a": torch.zeros(4), "c": torch.zeros(1), "d": torch.zeros(1)}
    with pytest.raises(WeightMismatchError) as error:
        check_match(theta, anchor)
    assert "1 of 3 weights missing (b)" in str(error.value)
    assert "1 of 3 weights unexpected (d)" in str(error.value)
    assert "a: theta (2,), anchor (4,)" in str(error.value)


def test_a_long_list_of_differences_is_cut_and_counted():
    with pytest.raises(WeightMismatchError, match=r"5 of 5 weights missing \(w0, w1, w2, and 2 more\)"):
        check_match({f"w{i}": torch.zeros(1) for i in range(5)}, {})


def test_tied_frozen_integer_and_complex_parameters_take_part_once_or_not_at_all():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    model[2].requires_grad_(False)
    model.phase = nn.Parameter(torch.zeros(1, dtype=torch.complex64))
    model.count = nn.Parameter(torch.tensor(1), requires_grad=False)
    assert list(trainable_weights(model)) == ["0.weight"]


@given(
    st.floats(0, 1, exclude_min=True, exclude_max=True), st.sampled_from([torch.float16, torch.bfloat16, torch.float32])
)
def test_half_precision_is_rounded_once(anchor_weight: float, dtype: torch.dtype):
    theta, anchor = torch.randn(100).to(dtype), torch.randn(100)
    exact = torch.lerp(theta.float(), anchor.float(), anchor_weight)
    assert torch.equal(lerp(theta, anchor, anchor_weight), exact.to(dtype))


@given(modules())
def test_applied_weights_come_and_go(model: nn.Module):
    other, own, (x, _) = moved(model), snapshot(model), batch()
    expected = copy.deepcopy(other).eval()(x)
    with applied(model.eval(), other.state_dict()) as inside:
        assert inside is model
        assert torch.equal(inside(x), expected)
    model.load_state_dict(own, strict=False)  # Counter buffers moved on by the forward pass
    assert identical(snapshot(model), own)


def test_weights_are_restored_after_an_exception():
    model = nn.Linear(2, 2)
    own = snapshot(model)
    with pytest.raises(KeyboardInterrupt), applied(model, {"weight": torch.zeros(2, 2)}):
        raise KeyboardInterrupt
    assert identical(snapshot(model), own)


def test_parameters_keep_their_identity_while_others_are_applied():
    model = nn.Linear(2, 2)
    weight, address = model.weight, model.weight.data_ptr()
    with applied(model, {"weight": torch.zeros(2, 2)}):
        assert model.weight is weight
        assert model.weight.data_ptr() == address


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"wieght": torch.zeros(2, 2)}, r"1 weights \(wieght\) are not in Linear"),
        ({"bias": torch.zeros(2), "weight": torch.zeros(3, 3)}, r"weight: the module \(2, 2\), what to apply \(3, 3\)"),
    ],
)
def test_nothing_changes_when_applied_weights_do_not_fit(weights: dict, message: str):
    model = nn.Linear(2, 2)
    own = snapshot(model)
    with pytest.raises(WeightMismatchError, match=message), applied(model, weights):
        pass
    assert identical(snapshot(model), own)


def test_applied_weights_are_seen_inside_an_open_autocast():
    model, x = nn.Linear(4, 4, bias=False), torch.eye(4)
    with torch.autocast("cpu", torch.bfloat16):
        own = model(x)  # leaves a bf16 copy of the weight in autocast's cache
        with applied(model, {"weight": torch.zeros(4, 4)}):
            assert torch.equal(model(x), torch.zeros(4, 4, dtype=torch.bfloat16))
        assert torch.equal(model(x), own)


class Buffered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("expanded", torch.ones(1).expand(3))
        self.register_buffer("plain", torch.ones(3))


def test_expanded_buffers_take_values_of_their_own():
    model, values = Buffered(), {"expanded": torch.tensor([1.0, 2.0, 3.0]), "plain": torch.zeros(3)}
    own = dict(model.named_buffers())
    with applied(model, values):
        assert identical(snapshot(model), values)
        assert model.plain is own["plain"]  # in place where it can be
    assert all(buffer is own[name] for name, buffer in model.named_buffers())
    assert torch.equal(model.expanded, torch.ones(3))
    load_weights(model, values)
    assert identical(snapshot(model), values)


def test_a_buffer_that_forward_registers_anew_comes_back_too():
    model = Buffered()
    own = model.plain
    with applied(model, {"plain": torch.zeros(3)}):
        model.plain = model.plain + 1
    assert model.plain is own
    assert torch.equal(own, torch.ones(3))


@pytest.mark.parametrize("name", ["expanded", "plain"])
def test_a_buffer_of_another_shape_is_refused(name: str):
    model = Buffered()
    own = snapshot(model)
    for put in (load_weights, lambda model, weights: applied(model, weights).__enter__()):
        with pytest.raises(WeightMismatchError, match=rf"{name}: the module \(3,\), what to (load|apply) \(1,\)"):
            put(model, {name: torch.zeros(1)})
    assert identical(snapshot(model), own)


def test_loaded_weights_stay():
    model, other = nn.Linear(2, 2), nn.Linear(2, 2)
    load_weights(model, {"weight": other.weight})
    assert torch.equal(model.weight, other.weight)
    assert model.weight is not other.weight


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(4, 3), nn.Linear(3, 4, bias=False)
        self.head.weight = self.embed.weight


def test_one_weight_is_not_given_two_values():
    model = Tied()
    own = snapshot(model)
    two = {"embed.weight": torch.zeros(4, 3), "head.weight": torch.ones(4, 3)}
    for put in (load_weights, lambda model, weights: applied(model, weights).__enter__()):
        with pytest.raises(WeightMismatchError, match=r"embed\.weight and head\.weight are one weight"):
            put(model, two)
    assert identical(snapshot(model), own)
    load_weights(model, {name: torch.ones(4, 3) for name in two})
    assert model.head.weight.eq(1).all()


def test_a_module_without_values_is_not_loaded_into():
    with pytest.raises(ValueError, match="meta device, without values"):
        load_weights(nn.Linear(2, 2, device="meta"), nn.Linear(2, 2).state_dict())


def test_fractions_are_not_cut_off():
    model = nn.Linear(1, 1)
    model.register_buffer("n", torch.zeros(1, dtype=torch.long))
    with pytest.raises(WeightMismatchError, match=r"n: torch\.float32\) are floating point.*would be cut off"):
        load_weights(model, {"n": torch.tensor([1.7])})
    assert model.n == 0


def test_weights_are_loaded_into_and_patched_from_compiled_models_by_their_bare_names():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    compiled = torch.compile(model, backend="eager")
    zeros = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
    patched = patch(zeros, compiled, anchor_weight=0.5)
    assert list(patched) == list(model.state_dict())
    assert torch.equal(patched["1.running_var"], torch.ones(2))
    load_weights(compiled, zeros)
    assert model[0].weight.abs().max() == 0
    with pytest.raises(WeightMismatchError, match=r"1 weights \(_orig_mod\.0\.bias\) are not in"):
        load_weights(compiled, {"_orig_mod.0.bias": torch.zeros(2)})


def test_codes_are_no_weights():
    model = torch.nn.Linear(2, 1)
    before = model.weight.detach().clone()
    codes = {"weight": torch.ones(1, 2, dtype=torch.int8)}
    with pytest.raises(WeightMismatchError, match=r"1 weights \(weight: torch\.int8\) are not floating point"):
        load_weights(model, codes)
    with pytest.raises(WeightMismatchError, match="quantised codes"), applied(model, codes):
        pass
    assert torch.equal(model.weight, before)
