"""Files of the safetensors format, read and written a piece at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from interpolate._places import base_name, opened
from interpolate._tensors import Entry, read_tensor, write_tensor
from interpolate.atomic import flushed
from interpolate.errors import CheckpointError

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
if hasattr(torch, "float8_e8m0fnu"):  # since torch 2.7
    _DTYPES["F8_E8M0"] = torch.float8_e8m0fnu
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


class SafetensorsShard:
    """One file; its header is read at once, and the file is opened anew when something is read after `close`."""

    key = ""
    """The format has one set of weights, """
    rest: tuple[str, ...] = ()
    """nothing beside it, """
    ties: tuple[tuple[str, ...], ...] = ()
    """and no ties."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._file: Any = None
        self.files = [path]
        with opened(path) as file:
            self.entries, self.starts, self.metadata = _header(file, path)

    def read(self, name: str, start: int, size: int) -> Tensor:
        """Elements of a tensor in order, from one on."""
        if self._file is None:
            self._file = opened(self.path)
        dtype = self.entries[name].dtype
        self._file.seek(self.starts[name] + start * dtype.itemsize)
        piece = read_tensor(self._file, dtype, size)
        if piece is None:
            raise CheckpointError(f"{self.path}: {name} is cut off; fetch or write the file again.")
        return piece

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file = None


def _header(file: Any, path: str) -> tuple[dict[str, Entry], dict[str, int], dict[str, str]]:
    """What is in a file, where each tensor begins in it, and its metadata."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= min(size - 8, 100_000_000):
        raise CheckpointError(f"{path} is not a whole safetensors file: {size} bytes, header of {length}.")
    header = parsed(file.read(length), path)
    metadata = header.pop("__metadata__", None) or {}
    if not (isinstance(metadata, dict) and all(isinstance(text, str) for text in metadata.values())):
        raise CheckpointError(f"{path}: the header's __metadata__ must be text by name, got {metadata!r:.80}.")
    described = [(name, *_described(path, name, value)) for name, value in header.items()]
    entries, starts, end = {}, {}, 0
    for name, dtype, shape, start, stop in sorted(described, key=lambda tensor: tensor[3:]):
        entries[name] = entry = Entry(dtype, shape, base_name(path))
        if start != end or stop - start != entry.n_bytes or 8 + length + stop > size:
            raise CheckpointError(f"{path}: {name} is cut off or its header is wrong; fetch or write it again.")
        starts[name], end = 8 + length + start, stop
    if 8 + length + end != size:
        raise CheckpointError(f"{path} has {size - 8 - length - end} bytes that belong to no tensor; write it again.")
    return entries, starts, metadata


def _described(path: str, name: str, value: Any) -> tuple[torch.dtype, tuple[int, ...], int, int]:
    value = value if isinstance(value, dict) else {}
    code, shape, offsets = value.get("dtype"), value.get("shape"), value.get("data_offsets")
    if not (isinstance(code, str) and _are_sizes(shape) and _are_sizes(offsets) and len(offsets) == 2):
        raise CheckpointError(
            f"{path}: the header's dtype, shape and data_offsets of {name} are {code!r}, {shape!r} and {offsets!r}; "
            "this is no safetensors file as the format has it. Write it again."
        )
    if code not in _DTYPES:
        raise CheckpointError(
            f"{path}: {name} has the dtype {code}, which can't be read here; {', '.join(_DTYPES)} can."
        )
    return _DTYPES[code], tuple(shape), offsets[0], offsets[1]


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(number) is int and number >= 0 for number in value)


def parsed(text: bytes, path: str) -> dict[str, Any]:
    """A JSON object in a file."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} can't be read as JSON where it should be: {error}.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__} where names and values should be.")
    return value


def write_safetensors(
    path: str,
    entries: Mapping[str, Entry],
    pieces: Callable[[str], Iterable[Tensor]],
    metadata: Callable[[bool], Mapping[str, str]],
) -> None:
    """Write tensors of those dtypes and shapes; see `interpolate.checkpoints.write` for `pieces` and `metadata`."""
    for name, entry in entries.items():
        if entry.dtype not in _CODES:
            raise CheckpointError(
                f"{name} is {str(entry.dtype).removeprefix('torch.')}, which safetensors files can't hold; "
                "write a .pt file."
            )
    names = sorted(entries, key=lambda name: -entries[name].dtype.itemsize)  # so that every tensor is aligned

    def header(final: bool) -> bytes:
        described: dict[str, Any] = {"__metadata__": metadata(final)}
        start = 0
        for name in names:
            offsets = [start, start := start + entries[name].n_bytes]
            shape = list(entries[name].shape)
            described[name] = {"dtype": _CODES[entries[name].dtype], "shape": shape, "data_offsets": offsets}
        text = json.dumps(described).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    with flushed(path) as file:
        before = header(False)
        file.write(before)
        for name in names:
            for piece in pieces(name):
                write_tensor(file, piece)
        after = header(True)
        assert len(after) == len(before)
        file.seek(0)
        file.write(after)
