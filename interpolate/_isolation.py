"""What a pass at other weights sees of a model, and how the model comes out of it as it went in."""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from interpolate._sharding import is_sharded, local
from interpolate.weights import listed

_CONTAINERS = (dict, OrderedDict, defaultdict, Counter, list, set, deque, tuple)


@contextmanager
def isolated(model: nn.Module, stand_ins: Mapping[int, Tensor]) -> Iterator[None]:
    """Let the modules of a model see copies of their own state, and tensors of the caller's where they hold weights.

    Forward passes change more than buffers: they register others, set attributes beside them, fill caches, count
    samples. So every attribute of every module that is a tensor or a container of Python's is copied for the length of
    a `with` block, and what the modules held before, untouched, is what they hold afterwards. Modules that are reached
    through attributes only are taken along. Objects of other kinds (a configuration, a logger) are shared.

    Registered parameters stay what they are, for `torch.func.functional_call` to replace; it does so in copies, which
    lets it go wrong in putting them back.

    Args:
        model: The model; its modules stay the same objects.
        stand_ins: The id of a parameter → what modules see in its place wherever else they hold it: in lists, as RNNs
            do, or as attributes.

    Raises:
        RuntimeError: At the end, if parameters without a stand-in have been written to: they are shared, since copies
            of all frozen weights would cost their memory.
    """
    copies = _Copies(stand_ins)
    modules = copies.of_modules(model)
    frozen = [_Shared(p) for p in copies.shared]
    cast, parametrize._cache = parametrize._cache, {}  # what `parametrize.cached()` has computed from other weights
    for module, _, seen in modules:
        vars(module).update(seen)
    try:
        yield
    finally:
        parametrize._cache = cast
        for module, own, _ in modules:
            vars(module).clear()
            vars(module).update(own)
        written = [shared.parameter for shared in frozen if shared.restore()]
    if written:
        names = {id(p): name for name, p in model.named_parameters()}
        raise RuntimeError(
            f"{len(written)} frozen parameters ({listed(names.get(id(p), str(tuple(p.shape))) for p in written)}) were "
            "written to in the pass at other weights, and would be again at theta. Update them after the optimizer's "
            "step, or make them buffers, of which either pass has its own."
        )


class _Copies:
    """Copies of what modules hold: each thing once, however often it is held, so that what was one stays one."""

    def __init__(self, stand_ins: Mapping[int, Tensor]) -> None:
        self.shared: list[nn.Parameter] = []
        """Parameters that the copies have in common with the originals."""
        self._copies: dict[int, Any] = dict(stand_ins)
        self._modules: list[nn.Module] = []

    def of_modules(self, root: nn.Module) -> list[tuple[nn.Module, dict[str, Any], dict[str, Any]]]:
        """Every module that can be reached, its attributes, and copies of them."""
        found = []
        self.of(root)
        while self._modules:
            module = self._modules.pop()
            own = vars(module).copy()
            seen = {name: self.of(value) for name, value in own.items()}
            if "_parameters" in own:
                seen["_parameters"] = own["_parameters"].copy()
            found.append((module, own, seen))
        return found

    def of(self, value: Any) -> Any:
        kind = type(value)  # not isinstance, which asks objects themselves: proxies of what is gone raise an error
        if kind in _CONTAINERS:
            return self._of_container(value)
        if not issubclass(kind, (Tensor, nn.Module)):
            return value
        if id(value) not in self._copies:
            if issubclass(kind, nn.Module):
                self._modules.append(value)
                self._copies[id(value)] = value
            elif isinstance(value, nn.Parameter):
                self.shared.append(value)
                self._copies[id(value)] = value
            else:
                self._copies[id(value)] = _of_tensor(value)
        return self._copies[id(value)]

    def _of_container(self, value: Any) -> Any:
        if id(value) in self._copies:
            return self._copies[id(value)]
        if type(value) is tuple:
            return tuple(map(self.of, value))
        self._copies[id(value)] = copy = value.copy()
        if isinstance(copy, dict):
            for key, item in value.items():
                copy[key] = self.of(item)
        elif not isinstance(copy, set):
            for i, item in enumerate(value):
                copy[i] = self.of(item)
        return copy


def _of_tensor(tensor: Tensor) -> Tensor:
    if not tensor.is_leaf:
        return tensor.clone()  # with its graph: what flows back to weights that are not interpolated has to be seen
    copy = tensor.detach().clone()
    return copy.requires_grad_() if tensor.requires_grad else copy


class _Shared:
    """A parameter that is not copied: whether it has been written to is found out afterwards."""

    def __init__(self, parameter: nn.Parameter) -> None:
        self.parameter = parameter
        self._data, self._version, self._sample = parameter.data, parameter._version, self._look()

    def restore(self) -> bool:
        """Take back what `parameter.data = ...` has put there; whether what was there before has been written to."""
        if not is_sharded(self.parameter):
            self.parameter.data = self._data
        if self.parameter._version != self._version:
            return True
        now = self._look()
        return now is not None and bool(((now != self._sample) & (now == now)).any())

    def _look(self) -> Tensor | None:
        """A copy of its last column or so: writing to `parameter.data` leaves no trace but the values."""
        own = local(self.parameter)
        if type(own) is not Tensor or not own.is_floating_point() or own.itemsize == 1 or not own.numel():
            return None
        return own[(..., *[-1] * (own.ndim - 1))].clone()
