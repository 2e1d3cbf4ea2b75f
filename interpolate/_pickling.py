"""Files of `torch.save`'s format, written a piece at a time; `torch.save` itself needs all of it in memory."""

from __future__ import annotations

import io
import json
import pickle
import struct
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import IO, Any

import torch
from torch import Tensor, nn
from torch._utils import _rebuild_parameter

from interpolate._pickled import METADATA
from interpolate._tensors import same_bits, write_storage, write_tensor
from interpolate.atomic import flushed
from interpolate.errors import CheckpointError

_ALIGNMENT = 64


def write_pickled(
    path: str,
    content: Any,
    weights: Mapping[str, Tensor],
    ties: Sequence[tuple[str, ...]],
    pieces: Callable[[str], Iterable[Tensor]],
    metadata: Callable[[bool], Mapping[str, str]],
) -> None:
    """Write a file that `torch.load` gives `content` from, with other elements in some of its tensors.

    The format is that of torch 1.6 and later: a zip archive of the pickled objects and of the tensors' storages, each
    at a multiple of 64 bytes, so that they can be mapped.

    Args:
        content: What the file is to hold; its other tensors are written as they are.
        weights: Those tensors in `content` that get other elements, by name; only dtypes and shapes are taken of them.
        ties: Names of weights that are one tensor, in groups.
        pieces: The elements of a tensor in order. Called once for each name.
        metadata: Called with True when all pieces are written; goes into a record of its own.

    Raises:
        CheckpointError: Weights that are one tensor would get different elements.
    """
    names = {name: (name,) for name in weights} | {name: tied for tied in ties for name in tied}
    pickled = io.BytesIO()
    pickler = _Pickler(pickled, {id(tensor): (tensor, names[name][0]) for name, tensor in weights.items()})
    pickler.dump(content)
    with flushed(path) as file, zipfile.ZipFile(file, "w") as archive:
        with _record(archive, file, "data.pkl") as record:
            record.write(pickled.getvalue())
        with _record(archive, file, "byteorder") as record:
            record.write(sys.byteorder.encode())
        for key, stored in enumerate(pickler.storages):
            with _record(archive, file, f"data/{key}") as record:
                if isinstance(stored, str):
                    for piece in _agreed(names[stored], pieces):
                        write_tensor(record, piece)
                else:
                    write_storage(record, stored)
        with _record(archive, file, METADATA) as record:
            record.write(json.dumps(metadata(True)).encode())
        with _record(archive, file, "version") as record:
            record.write(b"3\n")


def _agreed(names: tuple[str, ...], pieces: Callable[[str], Iterable[Tensor]]) -> Iterator[Tensor]:
    """The pieces that all names have."""
    for first, *others in zip(*map(pieces, names), strict=True):
        if not all(same_bits(first, other) for other in others):
            raise CheckpointError(
                f"{' and '.join(names)} are one tensor in the file that the output is to be like, and would get "
                "different values, since they are two in another input or in anchor_weight. Write a .safetensors file, "
                "which holds them separately."
            )
        yield first


@contextmanager
def _record(archive: zipfile.ZipFile, file: IO[bytes], name: str) -> Iterator[IO[bytes]]:
    info = zipfile.ZipInfo(f"archive/{name}")
    header = 30 + len(info.filename) + 4 + 20  # with this extra field's own header and the one for large files
    padding = -(file.tell() + header) % _ALIGNMENT
    info.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
    with archive.open(info, "w", force_zip64=True) as record:
        yield record


class _Stored:
    """Stands for a weight's storage while it is pickled."""

    def __init__(self, kind: Any, key: str, size: int) -> None:
        self.kind, self.key, self.size = kind, key, size


class _Pickler(pickle.Pickler):
    """As `torch.save` pickles; `storages` is what the archive's records must hold: storages, or names of weights."""

    def __init__(self, file: IO[bytes], weights: Mapping[int, tuple[Tensor, str]]) -> None:
        super().__init__(file, protocol=2)
        self.weights = dict(weights)
        self.storages: list[torch.UntypedStorage | str] = []
        self._keys: dict[int | str, str] = {}

    def reducer_override(self, obj: Any) -> Any:
        if id(obj) not in self.weights:
            return NotImplemented
        tensor, name = self.weights[id(obj)]
        if isinstance(tensor, nn.Parameter):
            plain = tensor.detach()
            self.weights[id(plain)] = plain, name
            return _rebuild_parameter, (plain, tensor.requires_grad, OrderedDict())
        like = torch.empty(0, dtype=tensor.dtype, requires_grad=tensor.requires_grad)
        rebuild, (storage, offset, _, _, *rest) = like.__reduce_ex__(2)
        kind, size = _kind(storage), tensor.numel() if _is_typed(storage) else tensor.nbytes
        stride = torch.empty(tensor.shape, device="meta").stride()
        return rebuild, (_Stored(kind, self._key(name, name), size), offset, tuple(tensor.shape), stride, *rest)

    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, _Stored):
            return "storage", obj.kind, obj.key, "cpu", obj.size
        if _is_typed(obj):
            storage: Any = obj._untyped_storage
            size = obj._size()
        elif torch.is_storage(obj):
            storage, size = obj, obj.nbytes()
        else:
            return None
        return "storage", _kind(obj), self._key(storage._cdata, storage), "cpu", size

    def _key(self, identity: int | str, stored: torch.UntypedStorage | str) -> str:
        if identity not in self._keys:
            self._keys[identity] = str(len(self.storages))
            self.storages.append(stored)
        return self._keys[identity]


def _is_typed(storage: Any) -> bool:
    return isinstance(storage, torch.storage.TypedStorage)


def _kind(storage: Any) -> Any:
    """The class that stands for a kind of storage in pickles."""
    return getattr(torch, storage._pickle_storage_type()) if _is_typed(storage) else torch.UntypedStorage
