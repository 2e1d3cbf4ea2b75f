"""What was found in checkpoints while they were mixed, read or compared."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from interpolate._operations import Recipe
from interpolate._tensors import same_bits
from interpolate.weights import listed, mixing_precision


@dataclass
class TensorReport:
    """What was found in one tensor of the inputs."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    mixed: bool
    distance: float | None = None
    """The largest Euclidean distance of another input's tensor from the first one's; None where no other was read, or
    where one has a value that is not finite and the other has not the same."""
    not_finite: int = 0
    """How many values are nan or infinite, in all inputs that were read together."""
    differs: bool = False
    """Whether another input's tensor, as far as it was read, is not the first one's, bit for bit and in its dtype."""


@dataclass
class Report:
    """What was mixed, how, and what was found; made before anything appears under the output's name."""

    inputs: list[str]
    """What was read, as the user calls it: paths, with what they are to the operation."""
    recipe: Recipe | None = None
    """What was carried out, or what a checkpoint that was only read says of how it was made."""
    tensors: list[TensorReport] = field(default_factory=list)
    tied: list[tuple[str, ...]] = field(default_factory=list)
    """Names that share memory in the first input."""
    prefixes: dict[str, str] = field(default_factory=dict)
    """What stands before all names of either an input or the first one, and was ignored; by the input's path."""
    left_behind: list[str] = field(default_factory=list)
    """What the first input holds beside its weights and a safetensors file has no room for."""
    unmatched: list[str] = field(default_factory=list)
    """What two checkpoints that were compared do not have in common: names of one of them, other shapes."""

    @property
    def differs(self) -> bool:
        """Whether the inputs are not the same in names, shapes, dtypes and values."""
        return bool(self.unmatched) or any(tensor.differs for tensor in self.tensors)

    def as_json(self) -> str:
        return as_json(asdict(self))

    def __str__(self) -> str:
        mixed = [t for t in self.tensors if t.mixed]
        known = sorted((t for t in mixed if t.distance is not None), key=lambda t: -(t.distance or 0))
        lines = [", ".join(self.inputs)]
        if self.recipe:
            arguments = (f"{k} {v}" for k, v in self.recipe.items() if k not in ("operation", "inputs", "sha256"))
            lines.append(" ".join([self.recipe["operation"], *arguments]))
        lines.append(f"{len(self.tensors)} tensors, {len(mixed)} of them weights")
        if known:
            total = math.hypot(*(t.distance or 0 for t in known))
            furthest = ", ".join(f"{t.name} ({t.distance:.4g})" for t in known[:3])
            lines[-1] += f"; distance of the inputs {total:.4g}, most in {furthest}"
        if self.recipe is None and (differing := [t.name for t in self.tensors if t.differs]):
            lines.append(f"{len(differing)} tensors differ in dtype or bits: {listed(differing)}")
        lines += [
            f"{t.name}: {t.not_finite} values are nan or infinite in the inputs" for t in self.tensors if t.not_finite
        ]
        lines += [f"tied: {', '.join(names)}" for names in self.tied]
        lines += [f"{path} matches apart from {prefix!r} before all names" for path, prefix in self.prefixes.items()]
        lines += [f"left behind: {', '.join(self.left_behind)}"] if self.left_behind else []
        lines += self.unmatched
        return "\n".join(lines)


class Comparison:
    """One tensor of some inputs, looked at piece by piece; `found` is right when all pieces have been."""

    def __init__(self, found: TensorReport) -> None:
        self.found = found
        self._totals: list[float] = []

    def add(self, first: Tensor, others: list[Tensor]) -> None:
        """Look at a piece in the first input and in the others."""
        found = self.found
        distances = [_distance(first, other) for other in others]
        # bits are looked at only where nothing tells them apart yet: most pieces of most files are at some distance
        found.differs = found.differs or max(distances, default=0) > 0 or not all(same_bits(first, o) for o in others)
        if not all(map(math.isfinite, distances)) or not others:
            found.not_finite += sum(map(_count_not_finite, (first, *others)))
            distances = [_distance(first, other, but_for_equals=True) for other in others]
        self._totals = self._totals or [0.0] * len(others)
        self._totals = [math.hypot(*pair) for pair in zip(self._totals, distances, strict=True)]  # squares may overflow
        total = max(self._totals, default=math.nan)
        found.distance = total if math.isfinite(total) else None


def as_json(found: Any) -> str:
    """JSON as its standard has it, without NaN and infinities: null stands for them."""
    return json.dumps(_finite(found), indent=2, allow_nan=False)


def _finite(found: Any) -> Any:
    if isinstance(found, dict):
        return {key: _finite(value) for key, value in found.items()}
    if isinstance(found, (list, tuple)):
        return [_finite(value) for value in found]
    return None if isinstance(found, float) and not math.isfinite(found) else found


def _distance(first: Tensor, other: Tensor, but_for_equals: bool = False) -> float:
    """Not finite if a value isn't, unless, with `but_for_equals`, the other one is the same."""
    difference = _wide(first, other) - _wide(other, first)
    if but_for_equals:
        difference = torch.where(_wide(first, other) == _wide(other, first), 0, difference)
    return torch.linalg.vector_norm(difference).item()


def _wide(tensor: Tensor, other: Tensor) -> Tensor:
    """In the least precision that both lose nothing in, apart from integers beyond 2 ** 53."""
    dtypes = tensor.dtype, other.dtype
    if any(dtype.is_complex for dtype in dtypes):
        return tensor.to(torch.complex128)
    if all(dtype.is_floating_point and mixing_precision(dtype) is torch.float32 for dtype in dtypes):
        return tensor.to(torch.float32)
    return tensor.to(torch.float64)


def _count_not_finite(tensor: Tensor) -> int:
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    return int((~tensor.double().isfinite()).sum()) if tensor.is_floating_point() else 0
