"""Random small module trees for property tests: nested, with tied, frozen, complex and integer parts, and BatchNorm."""

import copy
from collections.abc import Callable

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

WIDTH, BATCH = 3, 5


class Counter(nn.Module):
    """Counts its calls in an integer buffer and keeps the last input in a float one."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.tensor(0))
        self.register_buffer("last", torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last.copy_(x.detach()[0])
        return x


class Phase(nn.Module):
    """Has a complex parameter, and an integer one, as no optimizer of this project touches."""

    def __init__(self) -> None:
        super().__init__()
        self.phase = nn.Parameter(torch.randn(WIDTH, dtype=torch.complex64))
        self.shift = nn.Parameter(torch.tensor(1), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + (self.phase * self.shift).real.to(x)


def _frozen() -> nn.Module:
    return nn.Linear(WIDTH, WIDTH).requires_grad_(False)


def _tied() -> nn.Module:
    pair = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH, bias=False))
    pair[2].weight = pair[0].weight
    return pair


LAYERS: list[Callable[[], nn.Module]] = [
    lambda: nn.Linear(WIDTH, WIDTH),
    lambda: nn.BatchNorm1d(WIDTH),
    lambda: nn.LayerNorm(WIDTH),
    nn.Tanh,
    Counter,
    Phase,
    _frozen,
    _tied,
]


@st.composite
def modules(draw: st.DrawFn) -> nn.Module:
    """A float64 module from (BATCH, WIDTH) to (BATCH, WIDTH) with at least one trainable weight."""
    torch.manual_seed(draw(st.integers(0, 2**32 - 1)))
    trees = st.recursive(st.sampled_from(LAYERS), lambda inner: st.lists(inner, min_size=1, max_size=3), max_leaves=5)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), *(_build(draw(trees)) for _ in range(2))).double()


def _build(tree: list | Callable[[], nn.Module]) -> nn.Module:
    return nn.Sequential(*map(_build, tree)) if isinstance(tree, list) else tree()


def batch() -> tuple[Tensor, Tensor]:
    """Inputs and targets, (BATCH, WIDTH) in float64."""
    return torch.randn(BATCH, WIDTH).double(), torch.randn(BATCH, WIDTH).double()


def moved(model: nn.Module) -> nn.Module:
    """A copy of a model with its trainable weights somewhere else, as after some training."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad and p.is_floating_point():
                p.add_(torch.randn_like(p))
    return model


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers, copied."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def identical(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
