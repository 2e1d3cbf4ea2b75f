"""Checkpoints on disk or behind an fsspec URL, read and written piece by piece; the only place that touches files.

`PATH` is a `.safetensors` file, the `.safetensors.index.json` of a sharded one, or a file of `torch.save` (`.pt`,
`.pth`, `.pyth`, `.ckpt`, `.bin`), which is unpickled with `weights_only=True`. `PATH::KEY` picks one of several sets of
weights in the latter, for instance `last.ckpt::current_model_state`.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
import os
import posixpath
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from threading import Event
from typing import Any, BinaryIO

import fsspec
import torch
from torch import Tensor

from interpolate._names import bare, renamed
from interpolate._pickled import opened, unpickled
from interpolate.atomic import flushed, replaced_path, replacing
from interpolate.errors import CheckpointError

CHUNK = 1 << 18
"""How many elements of a tensor are in memory at a time: 1 MiB of float32."""

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_INDEX = ".safetensors.index.json"


@dataclass(frozen=True)
class Entry:
    """What a checkpoint says of a tensor; `shard` is the file that holds it, `start` its first byte there."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    shard: str
    start: int = 0

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Checkpoint:
    """An open checkpoint: `entries` by bare name, without what DDP, `torch.compile` and the like put into names.

    Args:
        path: `PATH` or `PATH::KEY` as described in this module.

    Raises:
        CheckpointError: The file is none, is cut off, or holds several sets of weights and none was picked.
        FileNotFoundError: There is no such file.

    Example:
        >>> import tempfile, os, torch
        >>> from safetensors.torch import save_file
        >>> path = os.path.join(tempfile.mkdtemp(), "a.safetensors")
        >>> save_file({"module.w": torch.ones(2)}, path)
        >>> with Checkpoint(path) as checkpoint:
        ...     checkpoint.tensor("w")
        tensor([1., 1.])
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path, _, self.key = os.fspath(path).rpartition("::")
        if not self.path or "/" in self.key:  # no key, but maybe a chained URL such as simplecache::s3://…
            self.path, self.key = os.fspath(path), ""
        self.metadata: dict[str, str] = {}
        self.files: list[str] = [self.path]
        """Every file that belongs to the checkpoint."""
        self._open: dict[str, BinaryIO] = {}
        self._tensors: dict[str, Tensor] = {}
        try:
            entries = self._entries()
        except BaseException:
            self.close()
            raise
        self.stored_names = bare({name: name for name in entries})
        """The names in the file, by name."""
        self.entries = {name: entries[stored] for name, stored in self.stored_names.items()}
        self.extras = {n: t for n, t in self._tensors.items() if n not in {*self.stored_names.values()}}
        """What torch's `AveragedModel` keeps beside the weights."""

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for file in self._open.values():
            file.close()

    @property
    def is_sharded(self) -> bool:
        return self.path.endswith(_INDEX)

    def rename(self, reference: Iterable[str]) -> None:
        """Take the names of another checkpoint where these differ from them by one prefix before all of them."""
        names = renamed(self.entries, reference)
        self.entries = {names[name]: entry for name, entry in self.entries.items()}
        self.stored_names = {names[name]: stored for name, stored in self.stored_names.items()}

    def tensor(self, name: str) -> Tensor:
        """A whole tensor."""
        return torch.cat([*self.chunks(name)]).reshape(self.entries[name].shape)

    def chunks(self, name: str) -> Iterator[Tensor]:
        """The tensor's elements in order, in one-dimensional pieces of at most `CHUNK`; at least one piece."""
        entry = self.entries[name]
        if self._tensors:
            yield from self._tensors[self.stored_names[name]].flatten().split(CHUNK)
            return
        file = self._open[entry.shard]
        file.seek(entry.start)
        for size in _sizes(math.prod(entry.shape)):
            piece = torch.empty(size, dtype=entry.dtype)
            if file.readinto(_bytes(piece)) != piece.nbytes:  # pyright: ignore[reportAttributeAccessIssue]
                raise CheckpointError(f"{self.path}: {name} is cut off; fetch or write the file again.")
            yield piece

    def tied(self) -> list[tuple[str, ...]]:
        """Names that share their memory, in groups; safetensors files keep no such ties."""
        groups: dict[tuple[int, int], list[str]] = {}
        for name, stored in self.stored_names.items() if self._tensors else ():
            tensor = self._tensors[stored]
            if tensor.numel():
                groups.setdefault((tensor.data_ptr(), tensor.numel()), []).append(name)
        return [tuple(names) for names in groups.values() if len(names) > 1]

    def sha256(self, stopped: Event | None = None) -> str:
        """The hash of the file; of a sharded checkpoint, that of the hashes of its index and shards in order.

        Args:
            stopped: Set it to have this end soon, with a `CheckpointError`.
        """
        digests = [_sha256(file, stopped) for file in self.files]
        return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()

    def _entries(self) -> dict[str, Entry]:
        if self.is_sharded:
            return self._index()
        if self.path.endswith(".safetensors"):
            return self._header(self.path)
        self.key, self._tensors, self.metadata = unpickled(self.path, self.key)
        return {n: Entry(t.dtype, tuple(t.shape), posixpath.basename(self.path)) for n, t in self._tensors.items()}

    def _index(self) -> dict[str, Entry]:
        with opened(self.path) as file:
            weight_map = _parsed(file.read(), self.path).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
            raise CheckpointError(f"{self.path} has no weight_map; it is not the index of a sharded checkpoint.")
        folder, entries = self.path[: len(self.path) - len(posixpath.basename(self.path))], {}
        for shard in sorted(set(weight_map.values())):
            if posixpath.basename(shard) != shard:
                raise CheckpointError(f"{self.path}: the shard {shard!r} must stand beside the index.")
            self.files.append(folder + shard)
            entries |= self._header(folder + shard)
        missing = [name for name in weight_map if name not in entries]
        if missing:
            raise CheckpointError(f"{self.path}: {len(missing)} tensors are not in their shards ({missing[0]}, …).")
        return {name: entries[name] for name in weight_map}

    def _header(self, path: str) -> dict[str, Entry]:
        """The entries of one safetensors file, which is left open for `chunks`."""
        shard = posixpath.basename(path)
        file = self._open[shard] = opened(path)
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(size - 8, 100_000_000):
            raise CheckpointError(f"{path} is not a whole safetensors file: {size} bytes, header of {length}.")
        header = _parsed(file.read(length), path)
        self.metadata |= header.pop("__metadata__", {})
        entries = {}
        for name, described in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            start, stop = described["data_offsets"]
            if described["dtype"] not in _DTYPES:
                raise CheckpointError(f"{path}: {name} has the dtype {described['dtype']}, which can't be read here.")
            entry = Entry(_DTYPES[described["dtype"]], tuple(described["shape"]), shard, 8 + length + start)
            if stop - start != entry.n_bytes or 8 + length + stop > size:
                raise CheckpointError(f"{path}: {name} is cut off or its header is wrong; fetch or write it again.")
            entries[name] = entry
        return entries


def write(
    path: str | os.PathLike[str],
    source: Checkpoint,
    pieces: Callable[[str], Iterable[Tensor]],
    metadata: Callable[[bool], Mapping[str, str]],
) -> None:
    """Write a checkpoint with the names, shapes, dtypes and shards of another; all of it, or nothing at all.

    Args:
        path: A `.safetensors` file, or a folder that does not exist yet if `source` is sharded; or a file for
            `torch.save`, which holds the weights under the key that `source` holds them under. Local or a URL.
        source: What to be like.
        pieces: The elements of a tensor in order. Called once for each name.
        metadata: Called with False before the pieces and with True after them, for what becomes known on the way;
            both times the same length.

    Raises:
        CheckpointError: The path is not of the kind that fits `source`.
        FileExistsError: The folder exists.
        OSError: Writing failed; what was at `path` is still there.
    """
    path = os.fspath(path)
    if source.is_sharded:
        if posixpath.splitext(path)[1] not in ("", "."):
            raise CheckpointError(f"{source.path} is sharded: the output must be a folder, got {path!r}.")
        fs, target = fsspec.core.url_to_fs(path)
        if fs.exists(target):
            raise FileExistsError(f"{path} exists; sharded checkpoints are written to new folders only.")
        with replaced_path(path, folder=True) as folder:
            shards: dict[str, list[str]] = {}
            for name, entry in source.entries.items():
                shards.setdefault(entry.shard, []).append(name)
            for shard, names in shards.items():
                _write_safetensors(os.path.join(folder, shard), source, names, pieces, metadata)
            total = sum(entry.n_bytes for entry in source.entries.values())
            weight_map = {source.stored_names[name]: entry.shard for name, entry in source.entries.items()}
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            with flushed(os.path.join(folder, posixpath.basename(source.path))) as file:
                file.write(json.dumps(index, indent=2).encode())
    elif path.endswith(".safetensors"):
        with replaced_path(path) as temporary:
            _write_safetensors(temporary, source, list(source.entries), pieces, metadata)
    elif posixpath.splitext(path)[1] in (".pt", ".pth", ".pyth", ".ckpt", ".bin"):
        weights = {
            source.stored_names[name]: torch.cat([*pieces(name)]).reshape(entry.shape)
            for name, entry in source.entries.items()
        } | source.extras
        with replacing(path) as file:
            torch.save({source.key: weights, **metadata(True)} if source.key else weights, file)
    else:
        raise CheckpointError(f"the output must end in .safetensors, .pt, .pth, .pyth, .ckpt or .bin, got {path!r}.")


def _write_safetensors(
    path: str,
    source: Checkpoint,
    names: list[str],
    pieces: Callable[[str], Iterable[Tensor]],
    metadata: Callable[[bool], Mapping[str, str]],
) -> None:
    def header(final: bool) -> bytes:
        described: dict[str, Any] = {"__metadata__": {**source.metadata, **metadata(final)}}
        start = 0
        for name in names:
            entry = source.entries[name]
            offsets = [start, start := start + entry.n_bytes]
            described[source.stored_names[name]] = {
                "dtype": _CODES[entry.dtype],
                "shape": list(entry.shape),
                "data_offsets": offsets,
            }
        text = json.dumps(described).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    with flushed(path) as file:
        before = header(False)
        file.write(before)
        for name in names:
            for piece in pieces(name):
                contiguous = piece.contiguous()  # named, or its memory would be gone before it is written
                file.write(_bytes(contiguous))
        after = header(True)
        assert len(after) == len(before)
        file.seek(0)
        file.write(after)


def _bytes(tensor: Tensor) -> Any:
    """The memory of a contiguous tensor as a buffer; numpy, which has no bfloat16, is not needed for it."""
    return (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr()) if tensor.numel() else bytearray()


def _sizes(n: int) -> list[int]:
    return [CHUNK] * ((n - 1) // CHUNK) + [(n - 1) % CHUNK + 1] if n else [0]


def _parsed(text: bytes, path: str) -> dict[str, Any]:
    try:
        parsed = json.loads(text)
    except ValueError as error:
        raise CheckpointError(f"{path} can't be read as JSON where it should be: {error}.") from error
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{path} holds a {type(parsed).__name__} where names and values should be.")
    return parsed


def _sha256(path: str, stopped: Event | None) -> str:
    digest, piece = hashlib.sha256(), memoryview(bytearray(1 << 18))  # small enough to stay in the processor's cache
    with opened(path) as file:
        while n := file.readinto(piece):
            digest.update(piece[:n])
            if stopped and stopped.is_set():
                raise CheckpointError(f"the hashing of {path} was stopped.")
    return digest.hexdigest()
