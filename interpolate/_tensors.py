"""Tensors as bytes: what a file says of one, and the hand-over of memory between tensors and files.

An address outlives its tensor, so none leaves this module: a function that takes the tensor does the reading or writing
itself, while it holds it.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

import torch
from torch import Tensor

CHUNK = 1 << 18
"""How many elements of a tensor are in memory at a time: 1 MiB of float32."""


@dataclass(frozen=True)
class Entry:
    """What a checkpoint says of a tensor; `shard` is the name of the file that holds it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    shard: str

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def n_bytes(self) -> int:
        return self.numel * self.dtype.itemsize


def spans(numel: int) -> Iterator[tuple[int, int]]:
    """Start and size of the pieces that a tensor is read in; at least one."""
    for start in range(0, max(numel, 1), CHUNK):
        yield start, min(CHUNK, numel - start)


def write_tensor(file: IO[bytes], tensor: Tensor) -> None:
    """Append the elements of a tensor of the CPU, in order."""
    tensor = tensor.detach().resolve_conj().resolve_neg().contiguous()
    _write(file, tensor.data_ptr(), tensor.nbytes)


def write_storage(file: IO[bytes], storage: torch.UntypedStorage) -> None:
    """Append the bytes of a storage of the CPU."""
    _write(file, storage.data_ptr(), storage.nbytes())


def read_tensor(file: Any, dtype: torch.dtype, numel: int) -> Tensor | None:
    """The next elements of a file, None if it ends before."""
    tensor = torch.empty(numel, dtype=dtype)
    return tensor if not numel or file.readinto(_memory(tensor.data_ptr(), tensor.nbytes)) == tensor.nbytes else None


def _write(file: IO[bytes], address: int, n_bytes: int) -> None:
    if n_bytes:
        file.write(_memory(address, n_bytes))


def _memory(address: int, n_bytes: int) -> Any:
    return (ctypes.c_char * n_bytes).from_address(address)  # numpy has no bfloat16, and is not needed for it


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are of one dtype and shape and hold the same bits: nan is itself, and 0.0 is not -0.0."""
    return a.dtype is b.dtype and a.shape == b.shape and torch.equal(_bits(a), _bits(b))


def _bits(tensor: Tensor) -> Tensor:
    flat = tensor.flatten()
    if flat.stride(0) != 1:  # also of no or of one element, which torch calls contiguous with any stride
        flat = flat.clone(memory_format=torch.contiguous_format)
    return flat.view(torch.uint8) if flat.numel() else torch.empty(0, dtype=torch.uint8)
