"""What `torch.save` and trainers wrote: the one place where anything is unpickled, and no code is ever run."""

from __future__ import annotations

import argparse
import json
import pathlib
import pickle
import posixpath
import re
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from interpolate._places import base_name, file_system, is_local, opened
from interpolate._tensors import Entry
from interpolate._torchscript import is_torchscript, torchscript_tensors
from interpolate.errors import CheckpointError

METADATA = "interpolate.json"
"""The record of a zip archive that holds what safetensors files hold as metadata; `torch.load` does not look at it."""

_ZIP = b"PK\x03\x04"


class PickledShard:
    """One file; what it holds is mapped into memory, and mapped anew when something is read after `close`.

    Local files of today's format only: the contents of others are held in memory.

    Args:
        path: A file of `torch.save`, or a TorchScript archive.
        key: Which of several sets of weights; empty where there is one. `.` is the outermost.
    """

    def __init__(self, path: str, key: str = "") -> None:
        self.path, self.key = path, key
        self.files = [path]
        self.metadata = _metadata(path)
        self.tensors: dict[str, Tensor] = {}
        self._content: Any = None
        self._flat: tuple[str, Tensor] | None = None
        content, weights = self._open()
        shard = base_name(path)
        self.entries = {name: Entry(t.dtype, tuple(t.shape), shard) for name, t in self.tensors.items()}
        self.ties = tuple(_ties(self.tensors))
        self.rest = [str(name) for name in weights if name not in self.tensors]
        """Names of what the file holds beside the tensors."""
        if weights is not content:
            outside = (name for name, value in content.items() if value is not weights)
            self.rest += [str(name) for name in outside if not self.key.startswith(f"{name}.")]

    def _open(self) -> tuple[Mapping[Any, Any], Mapping[Any, Any]]:
        self._content = _load(self.path)
        self.key, weights = chosen_set(self._content, self.path, self.key)
        self.tensors = {name: value for name, value in weights.items() if _is_named_tensor(name, value)}
        for name, tensor in self.tensors.items():
            _check_readable(self.path, name, tensor)
        return self._content, weights

    @property
    def content(self) -> Any:
        """All that the file holds, `tensors` being parts of it."""
        if self._content is None:
            self._open()
        return self._content

    def read(self, name: str, start: int, size: int) -> Tensor:
        """Elements of a tensor in order, from one on."""
        if self._content is None:
            self._open()
        if self._flat is None or self._flat[0] != name:  # not each time: it copies if the elements are not in a row
            self._flat = name, self.tensors[name].detach().resolve_conj().resolve_neg().flatten()
        return self._flat[1][start : start + size]

    def close(self) -> None:
        self._content = self._flat = None
        self.tensors = {}


def _load(path: str) -> Any:
    target = file_system(path)[1]
    with opened(path) as file:
        start = file.read(len(_ZIP))
        file.seek(0)
        if not start:
            raise CheckpointError(f"{path} is empty; fetch or write it again.")
        local = is_local(path)
        try:
            if start == _ZIP:
                with zipfile.ZipFile(file) as archive:
                    if is_torchscript(archive.namelist()):
                        return torchscript_tensors(archive)
                file.seek(0)
            with torch.serialization.safe_globals(_harmless()):
                return torch.load(
                    target if local else file, map_location="cpu", weights_only=True, mmap=local and start == _ZIP
                )
        except (OSError, MemoryError):
            raise
        except Exception as error:  # damaged pickles make torch raise whatever their bytes happen to mean
            raise CheckpointError(f"{path} can't be read as what torch.save writes: {_reason(error)}") from error


def _harmless() -> list[Any]:
    """Classes that only hold data, beside those that torch allows: command lines, paths, what numpy computes."""
    allowed: list[Any] = [argparse.Namespace]
    for path in (pathlib.PosixPath, pathlib.PurePosixPath):
        allowed += [(path, f"{module}.{path.__name__}") for module in ("pathlib", "pathlib._local")]
    try:
        import numpy as np  # optional; best scores and states of random generators are often its
        from numpy.core.multiarray import _reconstruct, scalar
    except ImportError:
        return allowed
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        allowed += [(_reconstruct, f"{module}._reconstruct"), (scalar, f"{module}.scalar")]
    return [*allowed, np.ndarray, np.dtype, *(type(np.dtype(code)) for code in "?bBhHiIlLqQefd")]


def _reason(error: Exception) -> str:
    text = str(error)
    if found := re.search(r"GLOBAL ([\w.]+)", text):
        return (
            f"it holds a {found[1]}, and code of files is never run here. If you trust it, load it with "
            "torch.load(…, weights_only=False) and save its state_dict() alone."
        )
    if found := re.search(r"WeightsUnpickler error:\s*(.+)", text):
        text = found[1]
    if not isinstance(error, (RuntimeError, pickle.UnpicklingError)):  # its text is of the wrong bytes
        text = "it is not in that format"
    return f"{(text or type(error).__name__).splitlines()[0][:200]}. Is it a checkpoint, and all of it?"


def _metadata(path: str) -> dict[str, str]:
    """What `interpolate.checkpoints.write` added to the archive."""
    with opened(path) as file:
        if file.read(len(_ZIP)) != _ZIP:
            return {}
        try:
            with zipfile.ZipFile(file) as archive:
                records = [name for name in archive.namelist() if posixpath.basename(name) == METADATA]
                return json.loads(archive.read(records[0])) if records else {}
        except (zipfile.BadZipFile, EOFError) as error:
            raise CheckpointError(f"{path} is cut off or damaged ({error}); fetch or write it again.") from error


def chosen_set(content: Any, path: str, key: str) -> tuple[str, Mapping[Any, Any]]:
    if isinstance(content, nn.Module) or not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not named tensors.")
    sets = dict(_sets(content))
    if key:
        if key not in sets:
            raise CheckpointError(f"{path} has no weights under {key!r}; it has {[*sets] or [*content][:5]}.")
        return key, sets[key]
    candidates = [name for name, weights in sets.items() if any(map(_is_weight, weights.values()))] or list(sets)
    if not candidates:
        raise CheckpointError(f"{path} holds no tensors; its keys are {[*content][:5]}.")
    if len(candidates) > 1:
        raise CheckpointError(
            f"{path} holds several sets of weights ({', '.join(candidates)}); pick one, as in {path}::{candidates[0]}."
        )
    return candidates[0], sets[candidates[0]]


def _sets(content: Mapping[Any, Any]) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    """What holds tensors by name, however deep, without optimizers' states and what modules keep beside weights."""
    waiting, seen = [("", content)], set()
    while waiting:
        path, mapping = waiting.pop(0)
        if id(mapping) in seen or "param_groups" in mapping:
            continue
        seen.add(id(mapping))
        if any(_is_named_tensor(name, value) for name, value in mapping.items()):
            yield path.removeprefix(".") or ".", mapping
        for name, value in mapping.items():
            if isinstance(value, Mapping) and not str(name).endswith("_extra_state"):
                waiting.append((f"{path}.{name}", value))


def _is_named_tensor(name: Any, value: Any) -> bool:
    return isinstance(name, str) and isinstance(value, Tensor)


def _is_weight(value: Any) -> bool:
    """Not a number kept as a tensor, as losses and steps are, nor a state of a random generator."""
    return isinstance(value, Tensor) and value.ndim > 0 and (value.is_floating_point() or value.is_complex())


def _check_readable(path: str, name: str, tensor: Tensor) -> None:
    kind = type(tensor).__name__ if type(tensor) not in (Tensor, nn.Parameter) else None
    kind = kind or ("nested" if tensor.is_nested else None)
    kind = kind or (str(tensor.layout).removeprefix("torch.") if tensor.layout != torch.strided else None)
    kind = kind or (tensor.device.type if tensor.device.type != "cpu" else None)
    if kind:
        raise CheckpointError(
            f"{path}: {name} is a {kind} tensor, which can't be read here; save a dense tensor of the CPU."
        )


def _ties(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, ...]]:
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, tensor in tensors.items():
        if tensor.numel():
            place = tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.is_conj(), tensor.is_neg()
            groups.setdefault(place, []).append(name)
    return (tuple(names) for names in groups.values() if len(names) > 1)
