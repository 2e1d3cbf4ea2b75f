"""What does a step with interpolated weight regularization cost, against the floor of two passes and one update?

The one-pass estimators are beside a plain step: `random` makes two thirds of its passes at theta.
"""

from __future__ import annotations

import copy

import torch
from measuring import interleaved, ratios, save
from torch import Tensor, nn

from interpolate import InterpolatedWeightRegularizer

F = nn.functional
RUNS = 7


def vit_b_32() -> tuple[nn.Module, Tensor, Tensor]:
    import open_clip

    model = open_clip.create_model("ViT-B-32", pretrained=None).get_submodule("visual")
    return model, torch.randn(4, 3, 224, 224), torch.randn(4, 512)


def wide_mlp() -> tuple[nn.Module, Tensor, Tensor]:
    model = nn.Sequential(*(layer for _ in range(4) for layer in (nn.Linear(2048, 2048), nn.GELU())))
    return model, torch.randn(64, 2048), torch.randn(64, 2048)


MODELS = {"ViT-B/32": vit_b_32, "wide MLP": wide_mlp}


def contenders(build) -> dict:
    torch.manual_seed(0)
    model, x, y = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)

    def loss_fn(model: nn.Module, x: Tensor = x, y: Tensor = y) -> Tensor:
        return F.mse_loss(model(x), y)

    def passes(n: int) -> None:
        for _ in range(n):
            loss_fn(model).backward()
        optimizer.step()
        optimizer.zero_grad()

    functional = InterpolatedWeightRegularizer(model)
    in_place = InterpolatedWeightRegularizer(model, strategy="in_place", anchor=functional.anchor)
    split, random = (
        InterpolatedWeightRegularizer(model, passes=passes, anchor=functional.anchor) for passes in ("split", "random")
    )
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
        regularizer.backward(loss_fn, x, y)
        optimizer.step()
        optimizer.zero_grad()

    return {
        "plain step": lambda: passes(1),
        "floor": lambda: passes(2),
        "functional": lambda: regularized(functional),
        "in_place": lambda: regularized(in_place),
        "split": lambda: regularized(split),
        "random": lambda: regularized(random),
        "published": published,
    }


def main() -> None:
    torch.set_num_threads(1)
    results = {}
    for name, build in MODELS.items():
        seconds = interleaved(contenders(build), RUNS)
        results[name] = {
            "time_over_floor": ratios(seconds, "floor"),
            "time_over_plain_step": ratios(seconds, "plain step"),
        }
    save("iwr_step", {"runs": RUNS, "results": results})


if __name__ == "__main__":
    main()
