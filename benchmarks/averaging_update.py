"""What does one update of an average cost, in time and memory, against one copy of the weights and its alternatives?

`float32 lerp` is the running mean in float32, the fastest there is; it stops moving after some ten thousand updates.
`float64 sum, read and written` is what an exact one can't do without, on top of which it reads and casts the weights.
`float64 sum, torch's loop over two dtypes` is the single operation that would do.
Lightning's `WeightAveraging` is torch's `AveragedModel`.
"""

from __future__ import annotations

import ctypes
import resource
from collections.abc import Callable
from importlib.metadata import version

import ema_pytorch
import torch
from measuring import alone, interleaved, ratios, save
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_swa_multi_avg_fn

from interpolate import EMAAverager, LAWAAverager, SWAAverager

RUNS = 25


def vision_tower() -> nn.Module:
    import open_clip

    torch.manual_seed(0)
    return open_clip.create_model("ViT-B-32", pretrained=None).get_submodule("visual")


def copy_of(model: nn.Module) -> Callable[[], object]:
    parameters = [p.detach() for p in model.parameters()]
    copies = [torch.zeros_like(p) for p in parameters]
    return lambda: torch._foreach_copy_(copies, parameters)


def float32_lerp(model: nn.Module) -> Callable[[], object]:
    parameters: list[Tensor] = [p.detach() for p in model.parameters()]
    means = [torch.zeros_like(p, dtype=torch.float32) for p in parameters]
    return lambda: torch._foreach_lerp_(means, parameters, 0.01)


def float64_sum_read_and_written(model: nn.Module) -> Callable[[], object]:
    sums: list[Tensor] = [p.detach().double() for p in model.parameters()]
    return lambda: torch._foreach_neg_(sums)


def mixed_dtypes(model: nn.Module) -> Callable[[], object]:
    parameters: list[Tensor] = [p.detach() for p in model.parameters()]
    sums = [p.double() for p in parameters]
    return lambda: torch._foreach_add_(sums, parameters)


def averaged_model(model: nn.Module) -> Callable[[], object]:
    averaged = AveragedModel(model)
    return lambda: averaged.update_parameters(model)


def averaged_model_multi(model: nn.Module) -> Callable[[], object]:
    averaged = AveragedModel(model, multi_avg_fn=get_swa_multi_avg_fn())
    return lambda: averaged.update_parameters(model)


def timm_ema(model: nn.Module) -> Callable[[], object]:
    average = ModelEmaV3(model, decay=0.999)
    return lambda: average.update(model)


def ema_pytorch_ema(model: nn.Module) -> Callable[[], object]:
    average = ema_pytorch.EMA(model, beta=0.999, update_after_step=0, update_every=1, use_foreach=True)
    return average.update


CONTENDERS: dict[str, Callable[[nn.Module], Callable[[], object]]] = {
    "copy": copy_of,
    "SWAAverager": lambda model: SWAAverager(model).update,
    "EMAAverager": lambda model: EMAAverager(model).update,
    "LAWAAverager, k=2": lambda model: LAWAAverager(model, k=2).update,
    "float32 lerp": float32_lerp,
    "float64 sum, read and written": float64_sum_read_and_written,
    "float64 sum, torch's loop over two dtypes": mixed_dtypes,
    "AveragedModel": averaged_model,
    "AveragedModel, multi_avg_fn": averaged_model_multi,
    "timm's ModelEmaV3": timm_ema,
    "ema-pytorch's EMA": ema_pytorch_ema,
}


OTHERS = {name: version(name) for name in ("timm", "ema-pytorch")}


def peak(name: str) -> float:
    """Memory over the model's own of a contender that is updated three times, in copies of the weights (Linux)."""
    model = vision_tower()
    ctypes.CDLL(None).malloc_trim(0)  # or what making the model has freed would be used again, uncounted
    with open("/proc/self/statm") as file:
        before = int(file.read().split()[1]) * resource.getpagesize()
    update = CONTENDERS[name](model)
    for _ in range(3):
        update()
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return (most - before) / sum(p.nbytes for p in model.parameters())


def main() -> None:
    torch.set_num_threads(1)
    peaks = {name: round(alone("averaging_update", "peak", name), 2) for name in CONTENDERS}
    model = vision_tower()
    seconds = interleaved({name: make(model) for name, make in CONTENDERS.items()}, RUNS)
    found = {"time_over_copy": ratios(seconds, "copy"), "peak_in_copies": peaks}
    save("averaging_update", {"runs": RUNS, "model": "ViT-B/32", "others": OTHERS, **found})


if __name__ == "__main__":
    main()
