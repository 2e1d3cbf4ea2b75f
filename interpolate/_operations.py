"""What is done to the tensors of one name: a recipe and the names, shapes and dtypes of weights become a function."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

from interpolate._sharding import is_sharded
from interpolate.weights import check_coefficient, lerp, listed, mixing_precision

T = TypeVar("T")

Ratio: TypeAlias = "float | Mapping[str, float]"
"""One weight of the anchor for all, or one for each name pattern (as in `fnmatch`); the first that fits holds."""

Recipe: TypeAlias = "dict[str, Any]"
"""An operation by name and its arguments, as JSON can keep them: what a file's metadata says of how it was made."""

_EXTRA_STATE = "_extra_state"
"""Where a module's own state stands in a state dict, which may be a tensor, but no weight (`get_extra_state`)."""

_BATCH_NORM_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


_ARGUMENTS = {
    "patch": "anchor_weight",
    "slerp": "anchor_weight",
    "average": "operation",
    "task_arithmetic": "scales",
    "snapshot": "step",
}
"""What a recipe must have for each operation; a snapshot was taken of a model in training, and can't be made again."""


def is_recipe(value: Any) -> bool:
    """Whether something that was read is a recipe, as written, with inputs and their hashes."""
    if not (isinstance(value, dict) and _ARGUMENTS.get(str(value.get("operation"))) in value):
        return False
    inputs: Any = value.get("inputs")
    hashes: Any = value.get("sha256")
    texts = [inputs, hashes, value.get("theta_only", [])]
    numbers = [value.get("weights", []), value.get("scales", [])]
    if not all(_is_list_of(text, str) for text in texts) or not all(_is_list_of(n, (int, float)) for n in numbers):
        return False
    return len(inputs) == len(hashes) and (len(inputs) == 2 or value["operation"] not in ("patch", "slerp"))


def _is_list_of(value: Any, kind: type | tuple[type, ...]) -> bool:
    return isinstance(value, list) and all(isinstance(item, kind) for item in value)


def sides_of(recipe: Recipe, n: int, paths: Sequence[str] = ()) -> list[str]:
    """What the user calls the n inputs of a recipe: what they are to it, and their paths if they have any."""
    if recipe["operation"] in ("patch", "slerp"):
        roles = ["theta", "anchor"]
    elif recipe["operation"] == "task_arithmetic":
        roles = ["anchor", *(f"theta {i}" for i in range(n - 1))]
    else:
        return list(paths) or [f"source {i}" for i in range(n)]
    return [f"{role} {path}" for role, path in zip(roles, paths, strict=True)] if paths else roles


def without_extra_state(weights: Mapping[str, T]) -> dict[str, T]:
    """Weights without the state that modules keep by `get_extra_state`, which may be of any kind and shape."""
    return {name: tensor for name, tensor in weights.items() if not name.endswith(_EXTRA_STATE)}


def is_mixed(name: str, dtype: torch.dtype) -> bool:
    """Whether a tensor of a checkpoint takes part in mixing, as far as name and dtype tell."""
    return dtype.is_floating_point and name.rpartition(".")[2] not in (*_BATCH_NORM_BUFFERS, _EXTRA_STATE)


def compiled(recipe: Recipe, names: Sequence[str], n_sources: int) -> Callable[[str, list[Tensor]], Tensor]:
    """A recipe as a function of a name and its tensors (of one shape), with all arguments checked.

    Raises:
        ValueError: The recipe is unknown, or an argument is out of its range.
    """
    kind = recipe["operation"]
    if kind == "patch":
        ratios = _ratios(as_numbers(recipe["anchor_weight"], recipe.get("extrapolate", False)), names)
        operation = lambda name, tensors: lerp(tensors[0], tensors[1], ratios[name])  # noqa: E731 # one of four alike
    elif kind == "slerp":
        weight = check_coefficient("anchor_weight", recipe["anchor_weight"])
        operation = lambda _, tensors: _slerp(tensors[0], tensors[1], weight)  # noqa: E731
    elif kind == "average":
        shares = _shares(recipe.get("weights", [1.0] * n_sources), n_sources)
        total = math.fsum(shares)
        operation = lambda _, tensors: (summed(tensors, shares) / total).to(tensors[0].dtype)  # noqa: E731
    elif kind == "task_arithmetic":
        scales = recipe["scales"]
        if len(scales) != n_sources - 1 or not all(map(math.isfinite, scales)):
            raise ValueError(f"scales must be {n_sources - 1} finite numbers, one for each theta, got {scales}.")
        operation = lambda _, tensors: _sum_of_tasks(tensors, scales)  # noqa: E731
    else:
        raise ValueError(f"unknown operation {kind!r} in a recipe.")
    return lambda name, tensors: checked(name, operation(name, tensors), tensors)


def summed(tensors: Sequence[Tensor], shares: Sequence[float] = ()) -> Tensor:
    """In float64: a running mean in float32 hardly moves after some thousand tensors.

    Args:
        shares: What each is multiplied by, if not by 1; of those with a 0 no value counts, nan neither.
    """
    total = torch.zeros_like(tensors[0].detach(), dtype=torch.float64)
    for tensor, share in zip(tensors, shares or [1.0] * len(tensors), strict=True):
        if share:
            total.add_(tensor.detach().to(total.device, torch.float64), alpha=share)
    return total


def _shares(weights: Any, n_sources: int) -> list[float]:
    """The weights of a mean, the heaviest being 1: equal ones give the bits of a plain mean, a single one its source's.

    They may be negative: an average made of other averages has such weights.
    """
    numbers = [float(weight) for weight in weights]
    if len(numbers) != n_sources:
        raise ValueError(f"weights must be one number for each of {n_sources} checkpoints, got {len(numbers)}.")
    heaviest = max(map(abs, numbers))
    shares = [number / heaviest for number in numbers] if 0 < heaviest < math.inf else []
    if not abs(math.fsum(shares)) > 1e-6:  # which nan is not
        raise ValueError(f"weights must be finite numbers with a sum that is not 0, got {numbers}.")
    return shares


def _sum_of_tasks(tensors: list[Tensor], scales: Sequence[float]) -> Tensor:
    anchor = tensors[0].detach()
    total = wide = anchor.to(mixing_precision(anchor.dtype))
    for theta, scale in zip(tensors[1:], scales, strict=True):
        total = total + scale * (theta.detach().to(wide) - wide)
    return total.to(anchor.dtype, copy=True)


def _slerp(theta: Tensor, anchor: Tensor, anchor_weight: float) -> Tensor:
    a, b = theta.detach().double(), anchor.detach().to(theta.device).double()
    cosine = _dot(a, b) / (_dot(a, a).sqrt() * _dot(b, b).sqrt())
    angle = torch.acos(cosine.clamp(-1, 1))
    if anchor_weight in (0, 1) or not angle.sin() > 1e-6:  # nearly parallel, or a zero vector
        return lerp(theta, anchor, anchor_weight)
    of_theta, of_anchor = (((w * angle).sin() / angle.sin()).item() for w in (1 - anchor_weight, anchor_weight))
    return (of_theta * a + of_anchor * b).to(theta.dtype)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """The inner product of whole tensors, however they are sharded."""
    products: Any = (a * b).sum()
    return products.full_tensor() if is_sharded(products) else products


def checked(name: str, mixed: Tensor, tensors: list[Tensor]) -> Tensor:
    """The mixed tensor, if it is finite; where all tensors are equal, infinite values are theirs and not nan."""
    wide = mixed.to(mixing_precision(mixed.dtype))  # float8 has no isfinite
    if wide.sum().isfinite():
        return mixed
    first = tensors[0].detach()
    equal = torch.stack([first == tensor.to(first) for tensor in tensors]).all(0)
    mixed = torch.where(equal, first, mixed)
    wrong = int((~(wide.isfinite() | equal)).sum())
    if wrong:
        raise ValueError(
            f"{name} has {wrong} values that are not finite after mixing; look for nan or inf in what is mixed."
        )
    return mixed


def patch_recipe(anchor_weight: Ratio, extrapolate: bool, theta_only: Sequence[str]) -> Recipe:
    """What `patch` does, checked and in Python's numbers; what is not asked for is not in it."""
    recipe = {"operation": "patch", "anchor_weight": as_numbers(anchor_weight, extrapolate)}
    if extrapolate:
        recipe["extrapolate"] = True
    if theta_only:
        recipe["theta_only"] = theta_only if isinstance(theta_only, str) else list(theta_only)
    return recipe


def as_numbers(anchor_weight: Ratio, extrapolate: bool) -> Ratio:
    """The same as Python's numbers, which a recipe can keep; what NumPy and torch compute are none of these."""
    if not isinstance(anchor_weight, Mapping):
        return check_coefficient("anchor_weight", anchor_weight, extrapolate=extrapolate)
    return {
        pattern: check_coefficient(f"anchor_weight of {pattern!r}", weight, extrapolate=extrapolate)
        for pattern, weight in anchor_weight.items()
    }


def _ratios(anchor_weight: Ratio, names: Sequence[str]) -> dict[str, float]:
    """The weight of the anchor for every name."""
    patterns = anchor_weight if isinstance(anchor_weight, Mapping) else {"*": anchor_weight}
    ratios: dict[str, float] = {}
    for pattern, weight in patterns.items():
        fitting = [name for name in names if fnmatchcase(name, pattern)]
        if not fitting and pattern != "*":
            raise ValueError(
                f"the pattern {pattern!r} in anchor_weight fits none of {len(names)} weights, e.g. {listed(names)}."
            )
        if ratios.keys() >= {*fitting} and pattern != "*":  # that there is no rest does no harm
            raise ValueError(
                f"the pattern {pattern!r} in anchor_weight decides nothing: what it fits ({listed(fitting)}) is "
                "decided by patterns before it. The first that fits holds: put the narrower one first."
            )
        ratios = dict.fromkeys(fitting, weight) | ratios
    without = [name for name in names if name not in ratios]
    if without:
        raise ValueError(f"no pattern in anchor_weight fits {listed(without)}; end with '*' for all the rest.")
    return ratios
