"""Names of weights without what wrappers put into them: one rule for modules, state dicts and files.

What `torch.compile`, activation checkpointing and FSDP put into a name is theirs wherever it stands. `module.` is a
wrapper's where the module is one, and among names alone where all of them begin with it. Any other prefix, such as the
`model.` of every Llama, belongs to the model; two sets of weights that differ by one alone still match.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import TypeVar

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from interpolate.errors import WeightMismatchError

T = TypeVar("T")

_WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}
_COUNTER = "n_averaged"
"""What `AveragedModel` keeps beside the weights."""


def bare_name(name: str) -> str:
    """A weight's name without the parts that are wrappers' at any depth.

    Example:
        >>> bare_name("_orig_mod.encoder._checkpoint_wrapped_module.weight")
        'encoder.weight'
    """
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside DDP, DataParallel, `AveragedModel` and `torch.compile`: the one that its weights belong to."""
    while True:
        if isinstance(module, (DistributedDataParallel, DataParallel, AveragedModel)):
            module = module.module
        elif "_orig_mod" in module._modules:
            module = module.get_submodule("_orig_mod")
        else:
            return module


def by_bare_name(named: Iterable[tuple[str, T]]) -> dict[str, T]:
    """What `named_parameters()` and the like of an unwrapped module give, by the bare names.

    Raises:
        WeightMismatchError: Two names differ by wrappers only.
    """
    bare: dict[str, T] = {}
    for name, value in named:
        if bare_name(name) in bare:
            raise WeightMismatchError(f"two weights are named {bare_name(name)!r} without wrappers; {name} is one.")
        bare[bare_name(name)] = value
    return bare


def bare(weights: Mapping[str, T]) -> dict[str, T]:
    """A state dict by bare names, told by the names alone; the counter of `AveragedModel` is left out.

    Example:
        >>> bare({"n_averaged": 3, "module._orig_mod.weight": 1.0, "module._orig_mod.bias": 2.0})
        {'weight': 1.0, 'bias': 2.0}
    """
    weights = by_bare_name(weights.items())
    while True:
        names = [name for name in weights if name != _COUNTER]
        if not names or not all(name.startswith("module.") for name in names):
            return weights
        weights = {name.removeprefix("module."): weights[name] for name in names}


def renamed(names: Iterable[str], reference: Iterable[str]) -> dict[str, str]:
    """Each name → the name of the reference that it stands for; all may differ from those by one prefix.

    Where they differ otherwise, names stand for themselves.

    Example:
        >>> renamed(["a.weight", "a.bias"], ["model.a.bias", "model.a.weight"])
        {'a.weight': 'model.a.weight', 'a.bias': 'model.a.bias'}
        >>> renamed(["a.weight"], ["b.weight"])
        {'a.weight': 'a.weight'}
    """
    names, reference = list(names), list(reference)
    if prefix := prefix_before(names, reference):
        return {name: name.removeprefix(prefix) for name in names}
    prefix = prefix_before(reference, names)
    return {name: prefix + name for name in names}


def prefix_before(longer: Collection[str], shorter: Collection[str]) -> str:
    """What stands before all the longer names and makes them of the shorter ones; empty if nothing does.

    Example:
        >>> prefix_before(["model.a", "model.b"], ["b", "a"])
        'model.'
    """
    prefix = max(longer, default="").removesuffix(max(shorter, default=""))  # a common prefix leaves the order alone
    return prefix if prefix.endswith(".") and {prefix + name for name in shorter} == set(longer) else ""
