"""What does a step with interpolated weight regularization cost, against the floor of two passes and one update?"""

from __future__ import annotations

import copy
import gc
import os
import subprocess
import sys

import torch
from measuring import interleaved, ratios, save
from torch import Tensor, nn

from interpolate import InterpolatedWeightRegularizer

F = nn.functional
RUNS = 7


def vit_b_32() -> tuple[nn.Module, Tensor, Tensor]:
    import open_clip

    model = open_clip.create_model("ViT-B-32", pretrained=None).visual
    return model, torch.randn(4, 3, 224, 224), torch.randn(4, 512)


def wide_mlp() -> tuple[nn.Module, Tensor, Tensor]:
    model = nn.Sequential(*(layer for _ in range(4) for layer in (nn.Linear(2048, 2048), nn.GELU())))
    return model, torch.randn(64, 2048), torch.randn(64, 2048)


MODELS = {"ViT-B/32": vit_b_32, "wide MLP": wide_mlp}


def contenders(build) -> dict:
    torch.manual_seed(0)
    model, x, y = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)

    def loss_fn(model: nn.Module) -> Tensor:
        return F.mse_loss(model(x), y)

    def passes(n: int) -> None:
        for _ in range(n):
            loss_fn(model).backward()
        optimizer.step()
        optimizer.zero_grad()

    functional = InterpolatedWeightRegularizer(model)
    in_place = InterpolatedWeightRegularizer(model, strategy="in_place", anchor=functional.anchor)
    raw = copy.deepcopy(model.state_dict())

    def published() -> None:
        """The published procedure: interpolate state dicts, load, forward and backward, keep gradients, load back."""
        theta = {n: t.clone() for n, t in model.state_dict().items()}
        alpha = functional.alpha
        model.load_state_dict(
            {n: alpha * raw[n] + (1 - alpha) * t if t.is_floating_point() else t for n, t in theta.items()}
        )
        loss_fn(model).backward()
        kept = [0.5 * p.grad.clone() for p in model.parameters() if p.grad is not None]
        model.load_state_dict(theta)
        optimizer.zero_grad()
        loss_fn(model).backward()
        for p, g in zip((p for p in model.parameters() if p.grad is not None), kept, strict=True):
            p.grad += g
        optimizer.step()
        optimizer.zero_grad()

    def regularized(regularizer: InterpolatedWeightRegularizer) -> None:
        regularizer.backward(loss_fn)
        optimizer.step()
        optimizer.zero_grad()

    return {
        "plain step": lambda: passes(1),
        "floor": lambda: passes(2),
        "functional": lambda: regularized(functional),
        "in_place": lambda: regularized(in_place),
        "published": published,
    }


def peak(model_name: str, kind: str) -> float:
    """Peak memory of one step in a process of its own, in copies of the parameters, above the model's own."""
    code = f"import iwr_step; print(iwr_step.peak_here({model_name!r}, {kind!r}))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=os.path.dirname(__file__))
    return float(done.stdout.split()[-1])


def peak_here(model_name: str, kind: str) -> float:
    import resource

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, x, y = MODELS[model_name]()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)

    def loss_fn(model: nn.Module) -> Tensor:
        return F.mse_loss(model(x), y)

    size = sum(p.nbytes for p in model.parameters())
    gc.collect()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    regularizer = None if kind == "plain step" else InterpolatedWeightRegularizer(model, strategy=kind)
    for _ in range(3):
        if regularizer is None:
            loss_fn(model).backward()
        else:
            regularizer.backward(loss_fn)
        optimizer.step()
        optimizer.zero_grad()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / size


def main() -> None:
    torch.set_num_threads(1)
    results = {}
    for name, build in MODELS.items():
        seconds = interleaved(contenders(build), RUNS)
        plain = peak(name, "plain step")
        results[name] = {
            "time_over_floor": ratios(seconds, "floor"),
            "time_over_plain_step": ratios(seconds, "plain step"),
            "peak_above_plain_step_in_copies_of_the_parameters": {
                kind: round(peak(name, kind) - plain, 2) for kind in ("functional", "in_place")
            },
        }
    save("iwr_step", {"runs": RUNS, "results": results})


if __name__ == "__main__":
    main()
