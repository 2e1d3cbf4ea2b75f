"""What does a teacher at the averaged weights cost, in time and memory, against one that is a module of its own?

python benchmarks/teacher_step.py               # both models
python benchmarks/teacher_step.py "wide MLP"

Time: a pass of the teacher over a plain pass of the model without gradient, in seconds of the processor, which other
processes hardly change. Memory: the peak of a step with the teacher in the loss and an update of its average, in copies
of the parameters, above that of a plain step; each in a process of its own. `copy of the average` is a deep copy that
the averager's weights are loaded into before each pass; `float32 copy` is a deep copy that is itself the average, by
lerp: the smallest there is, and no averager.
"""

from __future__ import annotations

import copy
import gc
import multiprocessing
import sys
import time
from collections.abc import Callable

import torch
from iwr_memory import kilobytes
from iwr_step import MODELS
from measuring import interleaved, ratios, save
from torch import Tensor, nn

from interpolate import EMAAverager, InterpolatedWeightRegularizer, load_weights

F = nn.functional
RUNS = 5
DECAY = 0.9998
SIZES = {"ViT-B/32": (4, 16, 64), "wide MLP": (64, 256, 1024)}
"""Samples in the batches whose time is measured."""

Teacher = Callable[[Tensor], Tensor]


def averaged(model: nn.Module) -> tuple[Teacher, Callable[[], object]]:
    averager = EMAAverager(model, DECAY, warmup=False, start_at="anchor")
    return averager, averager.update


def copy_of_average(model: nn.Module) -> tuple[Teacher, Callable[[], object]]:
    averager = EMAAverager(model, DECAY, warmup=False, start_at="anchor")
    teacher = copy.deepcopy(model).requires_grad_(False)

    def call(x: Tensor) -> Tensor:
        load_weights(teacher, averager.weights)
        return teacher(x)

    return call, averager.update


def float32_copy(model: nn.Module) -> tuple[Teacher, Callable[[], object]]:
    teacher = copy.deepcopy(model).requires_grad_(False)
    pairs = list(teacher.parameters()), list(model.parameters())

    @torch.no_grad()
    def update() -> None:
        torch._foreach_lerp_(*pairs, 1 - DECAY)

    return teacher, update


def at_anchor(model: nn.Module) -> tuple[Teacher, Callable[[], object]]:
    return InterpolatedWeightRegularizer(model).at_anchor, lambda: None


def copy_of_anchor(model: nn.Module) -> tuple[Teacher, Callable[[], object]]:
    teacher, anchor = copy.deepcopy(model).requires_grad_(False), InterpolatedWeightRegularizer(model).anchor
    load_weights(teacher, anchor)  # the anchor stays, for the regularizer
    return (lambda x: teacher(x) if anchor else x), lambda: None


CONTENDERS = {
    "averager(x)": averaged,
    "copy of the average": copy_of_average,
    "float32 copy": float32_copy,
    "regularizer.at_anchor(x)": at_anchor,
    "copy of the anchor": copy_of_anchor,
}


def peak_here(model_name: str, kind: str) -> float:
    """Peak memory of steps in this process, in copies of the parameters, above the model's own."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, x, y = MODELS[model_name]()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    size = sum(p.nbytes for p in model.parameters())
    gc.collect()
    before = kilobytes("VmRSS")
    teacher, update = CONTENDERS[kind](model) if kind in CONTENDERS else (None, lambda: None)
    for _ in range(3):
        output = model(x)
        F.mse_loss(output, teacher(x) if teacher else y).backward()
        optimizer.step()
        optimizer.zero_grad()
        update()
    return (kilobytes("VmHWM") - before) * 1024 / size


def alone(model_name: str, kinds: list[str]) -> list[float]:
    """The peak of each kind in a process of its own, forked from this one before it has made any model."""
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        return pool.starmap(peak_here, [(model_name, kind) for kind in kinds], chunksize=1)


def passes(model_name: str, n: int) -> dict[str, Callable[[], object]]:
    torch.manual_seed(0)
    model, x, _ = MODELS[model_name]()
    x = torch.randn(n, *x.shape[1:])
    averager, regularizer = EMAAverager(model, start_at="anchor"), InterpolatedWeightRegularizer(model)

    @torch.no_grad()
    def plain() -> Tensor:
        return model(x)

    return {
        "plain pass": plain,
        "averager(x)": lambda: averager(x),
        "regularizer.at_anchor(x)": lambda: regularizer.at_anchor(x),
    }


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    peaks, times = {}, {}
    for name in names or MODELS:
        plain, *others = alone(name, ["plain step", *CONTENDERS])
        peaks[name] = {kind: round(peak - plain, 2) for kind, peak in zip(CONTENDERS, others, strict=True)}
    for name in peaks:
        for n in SIZES[name]:
            times[f"{name}, {n} samples"] = ratios(interleaved(passes(name, n), RUNS, time.process_time), "plain pass")
    found = {"time_over_plain_pass": times, "peak_above_plain_step_in_copies_of_the_parameters": peaks}
    save("teacher_step", {"runs": RUNS, "decay": DECAY, **found})


if __name__ == "__main__":
    main(sys.argv[1:])
