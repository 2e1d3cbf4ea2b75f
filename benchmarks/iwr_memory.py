"""How much memory does a step with interpolated weight regularization take, above a plain step?

Each step runs in a process of its own; the peak is of its resident memory, in copies of the parameters, above that of
the process with the model built. The anchor is one of the copies.

What a device holds whose anchor is in the memory of another is counted, operation by operation: two kinds of device
that need not be there stand for the two, and nothing is computed or allocated.
"""

from __future__ import annotations

import gc

import torch
from iwr_step import MODELS
from measuring import alone, save
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from applications.openvclip.training.memory import Allocations, of_the_same_shapes
from interpolate import InterpolatedWeightRegularizer

F = nn.functional


def take_steps(model: nn.Module, x: Tensor, y: Tensor, regularizer: InterpolatedWeightRegularizer | None) -> None:
    """Three steps, plain ones where there is no regularizer."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)

    def loss_fn(model: nn.Module) -> Tensor:
        return F.mse_loss(model(x), y)

    for _ in range(3):
        if regularizer is None:
            loss_fn(model).backward()
        else:
            regularizer.backward(loss_fn)
        optimizer.step()
        optimizer.zero_grad()


def peak_here(model_name: str, kind: str) -> float:
    """Peak memory of steps in this process, in copies of the parameters, above the model's own."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, x, y = MODELS[model_name]()
    size = sum(p.nbytes for p in model.parameters())
    gc.collect()
    before = kilobytes("VmRSS")
    regularizer = None if kind == "plain step" else InterpolatedWeightRegularizer(model, strategy=kind)
    take_steps(model, x, y, regularizer)
    return (kilobytes("VmHWM") - before) * 1024 / size


def counted(model_name: str, anchor: str | None) -> float:
    """The most bytes alive on the model's device in a step, in copies of the parameters.

    The anchor is `beside` the model or `elsewhere`, or there is none, nor a regularizer.
    """
    real, *batch = MODELS[model_name]()
    with FakeTensorMode(), Allocations("cpu") as allocations:
        model = of_the_same_shapes(real)
        x, y = (torch.empty(t.shape) for t in batch)
        device = "cuda" if anchor == "elsewhere" else None
        regularizer = InterpolatedWeightRegularizer(model, anchor_device=device) if anchor else None
        take_steps(model, x, y, regularizer)
        return allocations.peak / sum(p.nbytes for p in model.parameters())


def kilobytes(field: str) -> int:
    """Of this process alone: the peak that `getrusage` tells is inherited from the parent."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field))


def main() -> None:
    torch.set_num_threads(1)
    results, on_device = {}, {}
    for name in MODELS:
        plain = alone("iwr_memory", "peak_here", name, "plain step")
        results[name] = {
            kind: round(alone("iwr_memory", "peak_here", name, kind) - plain, 2) for kind in ("functional", "in_place")
        }
        plain = counted(name, None)
        on_device[name] = {kind: round(counted(name, kind) - plain, 2) for kind in ("beside", "elsewhere")}
    save(
        "iwr_memory",
        {
            "peak_above_plain_step_in_copies_of_the_parameters": results,
            "counted_on_a_device_by_place_of_the_anchor": on_device,
        },
    )


if __name__ == "__main__":
    main()
