"""A pass at averaged weights, or at the anchor, while theta is trained: what an explicit copy gives, and no trace."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_modules import batch, identical, modules, moved, snapshot
from test_isolation import Stateful, state_of
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from interpolate import (
    EMAAverager,
    InterpolatedWeightRegularizer,
    LAWAAverager,
    SWAAverager,
    WeightAverager,
    WeightMismatchError,
    load_weights,
)
from interpolate.weights import Weights, trainable_weights

F = nn.functional
FAMILY = [SWAAverager, partial(EMAAverager, decay=0.7), partial(LAWAAverager, k=2)]
Teacher = Callable[..., Any]


def averaged(model: nn.Module, kind: Callable[..., WeightAverager] = SWAAverager, **options) -> WeightAverager:
    """An average over two points, away from the weights and the buffers that the model is left with."""
    averager = kind(model, **options)
    for _ in range(2):
        move(model)
        averager.update()
    move(model)
    return averager


def move(model: nn.Module) -> None:
    with torch.no_grad():
        model(batch()[0].to(next(model.parameters()).dtype))  # buffers go on too
    model.load_state_dict({**model.state_dict(), **{n: p.detach() for n, p in moved(model).named_parameters()}})


def explicit(averager: WeightAverager) -> Teacher:
    """A module of its own at the average."""
    return copied(averager.model, {**averager.weights, **averager.buffers})


def copied(model: nn.Module, weights: Weights, training: bool = True) -> Teacher:
    teacher = copy.deepcopy(model)
    load_weights(teacher, weights)
    return torch.no_grad()(teacher if training else teacher.eval())


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def step(model: nn.Module, x: Tensor, teacher: Teacher, *, first: bool, student: Teacher):
    """Targets from the teacher before the student's forward pass, or between its forward and its backward pass."""
    torch.manual_seed(0)
    target = teacher(x) if first else None
    output = student(x)
    if target is None:
        target = teacher(x)
    assert not target.requires_grad
    F.mse_loss(output.float(), target.float()).backward()
    return target, gradients(model), snapshot(model)


def check_same(a, b) -> None:
    assert torch.equal(a[0], b[0])
    assert identical(a[1], b[1])
    assert identical(a[2], b[2])


def check_as_a_copy(averager: WeightAverager, x: Tensor, student: Teacher | None = None) -> None:
    """Whether a step with the averager as teacher is, bit for bit, that with an explicit copy."""
    model = averager.model
    before = snapshot(model)
    for first in (True, False):
        expected = step(model, x, explicit(averager), first=first, student=student or model)
        restore(model, before)
        found = step(model, x, averager, first=first, student=student or model)
        check_same(found, expected)
        assert identical(dict(model.named_parameters()), {n: before[n] for n, _ in model.named_parameters()})
        restore(model, before)


def restore(model: nn.Module, before: dict[str, Tensor]) -> None:
    model.zero_grad()
    model.load_state_dict(before)


@given(modules(), st.sampled_from(FAMILY))
def test_a_step_with_the_average_as_teacher_is_that_with_an_explicit_copy(model: nn.Module, kind):
    check_as_a_copy(averaged(model, kind), batch()[0])


@given(modules())
def test_a_step_with_the_anchor_as_teacher_is_that_with_an_explicit_copy(model: nn.Module):
    regularizer = InterpolatedWeightRegularizer(model)
    model.load_state_dict(moved(model).state_dict())
    x, before = batch()[0], snapshot(model)
    for first in (True, False):
        expected = step(model, x, copied(model, regularizer.anchor), first=first, student=model)
        restore(model, before)
        check_same(step(model, x, regularizer.at_anchor, first=first, student=model), expected)
        restore(model, before)
    assert regularizer.step == 0


def test_state_of_any_kind_is_as_it_was():
    model = Stateful().double()
    averager, x = averaged(model), batch()[0]
    before = state_of(model)
    averager(x)
    assert state_of(model) == before

    def failing(model: nn.Module) -> None:
        model(x)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        averager.run(failing)
    assert state_of(model) == before


def test_the_buffers_of_the_teacher_are_those_of_the_average():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).double()
    averager = averaged(model)
    model.eval()
    assert not torch.equal(averager.buffers["1.running_mean"], model[1].running_mean)
    check_as_a_copy(averager, batch()[0])


def test_a_function_may_put_the_teacher_into_a_mode_of_its_own():
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5), nn.BatchNorm1d(3)).double()
    averager, x = averaged(model), batch()[0]
    output: Any = averager.run(lambda model: model.eval()(x))
    assert torch.equal(output, copied(model, {**averager.weights, **averager.buffers}, training=False)(x))
    assert all(module.training for module in model.modules())
    check_as_a_copy(averager, x)  # with dropout: the same seed, the same masks


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.3), nn.BatchNorm1d(3))
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        output = checkpoint(self.second, self.first(x).tanh(), use_reentrant=self.use_reentrant)
        assert isinstance(output, Tensor)
        return output


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # reentrant checkpoints without gradient
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_recomputation_of_the_student_sees_theta(use_reentrant: bool):
    check_as_a_copy(averaged(Checkpointed(use_reentrant).double()), batch()[0])


def test_autocast_keeps_no_cast_of_the_teacher_for_the_student():
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    averager, x, before = averaged(model), batch()[0].float(), snapshot(model)
    for first in (True, False):
        found = []
        for teacher in (explicit(averager), averager):
            with torch.autocast("cpu", torch.bfloat16):
                found.append(step(model, x, teacher, first=first, student=model))
            assert len(found[-1][1]) == 4
            restore(model, before)
        check_same(*found)


def test_half_precision_is_that_of_a_copy():
    check_as_a_copy(averaged(nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)).bfloat16()), batch()[0].bfloat16())


class Operations(TorchDispatchMode):
    """Notes the operations of torch that are done."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_the_teacher_takes_the_kernels_of_a_plain_pass_without_gradient():
    model = nn.Linear(3, 3, bias=False)  # whose product is folded, or not, by whether the weights require gradients
    averager, regularizer = SWAAverager(model, start_at="anchor"), InterpolatedWeightRegularizer(model)
    x = torch.randn(4, 5, 3).transpose(0, 1)
    with Operations() as plain, torch.no_grad():
        model(x)
    for run in (averager.run, regularizer.run_at_anchor):
        with Operations() as found:
            run(lambda model: (found.names.clear(), model(x), found.names.append("the end")))
        assert found.names[: found.names.index("the end")] == plain.names


class Twice(nn.Module):
    """One submodule under two names, a recurrent layer that keeps its weights in a list, and tied weights."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.LSTM(3, 3)
        self.also_body = self.body
        self.head, self.tied = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        self.tied.weight = self.head.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.tied(self.head(self.also_body(self.body(x)[0])[0]))


def test_weights_held_in_several_places_are_all_those_of_the_average():
    model = Twice().double()
    averager = averaged(model)
    check_as_a_copy(averager, batch()[0])
    model.head.weight.register_hook(lambda gradient: gradient)
    assert torch.equal(averager(batch()[0].zero_()), explicit(averager)(batch()[0].zero_()))


@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_a_compiled_model_is_compiled_once_for_the_teacher():
    torch.compiler.reset()
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable:
        graphs.append(graph)
        return graph.forward

    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    compiled: Any = torch.compile(model, backend=backend)
    averager, x = averaged(compiled), batch()[0]
    for _ in range(4):
        output, target = compiled(x), averager(x)
        assert torch.equal(target, copied(model, averager.weights)(x))
        F.mse_loss(output, target).backward()
        assert len(gradients(model)) == 4
        move(model)
        averager.update()
    assert len(graphs) == 3  # without gradient in averaged(), the student, the teacher


@pytest.mark.parametrize("strategy", ["functional", "in_place"])
def test_a_teacher_may_be_asked_within_the_loss_at_interpolated_weights(strategy):
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3)).double()
    anchor, averager = trainable_weights(moved(model)), averaged(model)
    x, before = batch()[0], snapshot(model)
    frozen = copied(model, anchor)
    found = []
    for explicitly in (True, False):
        regularizer = InterpolatedWeightRegularizer(model, anchor=anchor, strategy=strategy)
        first, second = (explicit(averager), frozen) if explicitly else (averager, regularizer.at_anchor)

        def loss_fn(model: nn.Module, first: Teacher = first, second: Teacher = second) -> Tensor:
            output = model(x)
            return F.mse_loss(output, first(x)) + F.mse_loss(output, second(x))

        loss = regularizer.backward(loss_fn)
        found.append((loss, {n: g.clone() for n, g in gradients(model).items()}, snapshot(model)))
        restore(model, before)
    check_same(*found)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*is deprecated")
def test_what_cannot_be_right_is_refused():
    model = nn.Sequential(nn.Linear(3, 3)).double()
    with pytest.raises(RuntimeError, match=r"no weights have been averaged: .* start_at='anchor'"):
        SWAAverager(model)(batch()[0])
    regularizer = InterpolatedWeightRegularizer(torch.jit.script(model))
    with pytest.raises(RuntimeError, match=r"TorchScript \(the model, 0\) keeps its weights .* interpolate\.applied"):
        regularizer.at_anchor(batch()[0])
    averager = SWAAverager(nn.DataParallel(model), start_at="anchor")
    with pytest.raises(ValueError, match="DataParallel is not supported"):
        averager(batch()[0])
    averager = SWAAverager(model, start_at="anchor")
    model[0].bias.requires_grad_(False)
    with pytest.raises(WeightMismatchError, match=r"1 of 2 weights unexpected \(0\.bias\)"):
        averager(batch()[0])
    model = nn.BatchNorm1d(3)
    averager = SWAAverager(model, start_at="anchor")
    del model.running_mean
    with pytest.raises(WeightMismatchError, match=r"1 buffers \(running_mean\) are not in BatchNorm1d"):
        averager(batch()[0])
