"""Checkpoints that processes wrote together, each its own parts of the tensors, with `torch.distributed.checkpoint`.

Two formats: a folder of `.distcp` files with an index, `.metadata`; and safetensors files, one a process, each of which
says where its parts belong.
"""

from __future__ import annotations

import math
import posixpath
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from interpolate._distributed_pickles import Window, elements_of, read_index
from interpolate._pickled import METADATA, chosen_set
from interpolate._places import DISTRIBUTED_INDEX, RANK_FILE, beside, file_system, opened
from interpolate._safetensors import SafetensorsShard, parsed
from interpolate._tensors import Entry, read_tensor
from interpolate.errors import CheckpointError

OFFSETS = "DCP_SHARDING_INFO"
"""The key in the metadata of a safetensors file under which stands where its tensors begin in the whole ones."""


@dataclass(eq=False)
class _Part:
    """A box of a tensor, in one of the files."""

    file: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    start: int
    """Where its elements begin in the file, or the file of `torch.save` that holds it alone."""
    length: int = 0
    """How long that file of `torch.save` is; 0 where the elements stand bare."""

    @property
    def numel(self) -> int:
        return math.prod(self.sizes)


class DistributedShard:
    """All files of one checkpoint as if they were one; one is open at a time.

    Tensors are read a piece at a time where processes share them by rows; otherwise whole ones are put together.
    """

    ties: tuple[tuple[str, ...], ...] = ()
    """Neither format keeps any."""

    def __init__(self, path: str, key: str, entries: Mapping[str, Entry], parts: Mapping[str, list[_Part]]) -> None:
        self.path, self.key = path, key
        self.entries, self._parts = entries, parts
        self.metadata: dict[str, str] = {}
        self.rest: list[str] = []
        """Names of what the folder holds beside the tensors."""
        self._file: tuple[str, Any] | None = None
        self._whole: tuple[Any, Tensor] | None = None
        for name, entry in entries.items():
            ends = [map(sum, zip(part.offsets, part.sizes, strict=True)) for part in parts[name]]
            outside = any(end > size for end_of in ends for end, size in zip(end_of, entry.shape, strict=True))
            if outside or sum(part.numel for part in parts[name]) != entry.numel:
                raise CheckpointError(
                    f"{path}: the parts of {name} do not make a whole of {entry.shape}; a file is missing."
                )
            parts[name].sort(key=lambda part: part.offsets)

    @property
    def files(self) -> list[str]:
        """Every file that belongs to the checkpoint."""
        own = {part.file for parts in self._parts.values() for part in parts}
        return [*([self.path] if self.path.endswith(DISTRIBUTED_INDEX) else []), *sorted(own)]

    def read(self, name: str, start: int, size: int) -> Tensor:
        """Elements of a tensor in order, from one on."""
        entry, pieces = self.entries[name], [torch.empty(0, dtype=self.entries[name].dtype)]
        if any(part.sizes[1:] != entry.shape[1:] for part in self._parts[name]):
            return self._put_together(name)[start : start + size]
        for part in self._parts[name]:
            begin = part.offsets[0] * math.prod(entry.shape[1:]) if part.offsets else 0
            low, high = max(start, begin), min(start + size, begin + part.numel)
            if low < high:
                pieces.append(self._read(part, low - begin, high - low, entry.dtype))
        return torch.cat(pieces[1:] or pieces)

    def close(self) -> None:
        if self._file is not None:
            self._file[1].close()
        self._file = self._whole = None

    def _put_together(self, name: str) -> Tensor:
        if self._whole is None or self._whole[0] != name:
            entry = self.entries[name]
            whole = torch.empty(entry.shape, dtype=entry.dtype)
            for part in self._parts[name]:
                box = tuple(slice(o, o + size) for o, size in zip(part.offsets, part.sizes, strict=True))
                whole[box] = self._read(part, 0, part.numel, entry.dtype).reshape(part.sizes)
            self._whole = name, whole.flatten()
        return self._whole[1]

    def _read(self, part: _Part, first: int, size: int, dtype: torch.dtype) -> Tensor:
        file = self._opened(part.file)
        if part.length:
            start = elements_of(file, part.file, part.start, part.length, Entry(dtype, part.sizes, ""))
            if start is None:  # not in order in memory when it was saved
                if self._whole is None or self._whole[0] is not part:
                    window: Any = Window(file, part.start, part.length)
                    loaded = torch.load(window, map_location="cpu", weights_only=True)
                    self._whole = part, loaded.flatten()
                return self._whole[1][first : first + size]
            part.start, part.length = start, 0
        file.seek(part.start + first * dtype.itemsize)
        piece = read_tensor(file, dtype, size)
        if piece is None:
            raise CheckpointError(f"{part.file} is cut off; fetch or write it again.")
        return piece

    def _opened(self, path: str) -> Any:
        if self._file is None or self._file[0] != path:
            if self._file is not None:
                self._file[1].close()
            self._file = path, opened(path)
        return self._file[1]


def distributed_folder(path: str, key: str = "") -> DistributedShard:
    """The checkpoint with this index, or the set of weights in it that the key names."""
    index = read_index(path)
    parts: dict[str, list[_Part]] = {}
    for place, info in index.storage_data.items():
        if getattr(info, "transform_descriptors", None):
            raise CheckpointError(f"{path}: {place.fqn} was written through extensions, which can't be read here.")
        described = index.state_dict_metadata[place.fqn]
        for chunk in getattr(described, "chunks", []):
            if chunk.offsets == place.offset:
                file = beside(path, info.relative_path)
                part = _Part(file, tuple(chunk.offsets), tuple(chunk.sizes), info.offset, info.length)
                parts.setdefault(place.fqn, []).append(part)
    content: dict[Any, Any] = {}
    tensors: dict[int, str] = {}
    for stored, described in index.state_dict_metadata.items():
        *parents, last = (index.planner_data or {}).get(stored, (stored,))
        place = content
        for parent in parents:
            place = place.setdefault(parent, {})
        if hasattr(described, "chunks"):
            place[last] = torch.empty(described.size, dtype=described.properties.dtype, device="meta")
            tensors[id(place[last])] = stored
        else:
            place[last] = None
    key, weights = chosen_set(content, path, key)
    names = {name: tensors[id(value)] for name, value in weights.items() if id(value) in tensors}
    shard = posixpath.basename(path)
    entries = {name: Entry(weights[name].dtype, tuple(weights[name].shape), shard) for name in names}
    found = DistributedShard(path, key, entries, {name: parts.get(stored, []) for name, stored in names.items()})
    fs, record = file_system(beside(path, METADATA))
    if fs.exists(record):
        found.metadata = parsed(fs.cat_file(record), beside(path, METADATA))
    found.rest = sorted(index.state_dict_metadata.keys() - {*names.values()})
    return found


def distributed_safetensors(path: str) -> DistributedShard | None:
    """The checkpoint that a safetensors file is one process's part of; None if the file is whole."""
    name = posixpath.basename(path)
    if not re.fullmatch(RANK_FILE, name):
        return None
    fs, folder = file_system(path.removesuffix(name) or ".")
    names = sorted(posixpath.basename(other) for other in fs.ls(folder, detail=False))
    numbers = {other: tuple(map(int, rank.groups())) for other in names if (rank := re.fullmatch(RANK_FILE, other))}
    names, ranks, files, totals = [*numbers], *map(set, zip(*numbers.values(), strict=True))
    if ranks != {*range(1, len(ranks) + 1)} or files != {*range(1, max(totals) + 1)}:
        raise CheckpointError(f"{path}: of the files of all processes some are missing; there are {', '.join(names)}.")
    parts: dict[str, list[_Part]] = {}
    dtypes: dict[str, torch.dtype] = {}
    for other in names:
        shard = SafetensorsShard(beside(path, other))
        places = parsed(shard.metadata.get(OFFSETS, "{}").encode(), shard.path)
        for tensor, entry in shard.entries.items():
            offsets = tuple(places.get(tensor, {}).get("saved_offsets") or [0] * len(entry.shape))
            parts.setdefault(tensor, []).append(_Part(shard.path, offsets, entry.shape, shard.starts[tensor]))
            if dtypes.setdefault(tensor, entry.dtype) is not entry.dtype:
                raise CheckpointError(f"{path}: the parts of {tensor} are of several dtypes.")
    if states := [tensor for tensor in parts if re.search(r"(^|[./])optim(izer)?s?[./]", tensor)]:
        raise CheckpointError(
            f"{path} is the state of a whole training: {len(states)} of its {len(parts)} tensors are an optimizer's, "
            f"such as {states[0]}. Give weights alone: snapshots, or what the training left at its end."
        )
    entries = {tensor: Entry(dtypes[tensor], _shape(boxes), name) for tensor, boxes in parts.items()}
    return DistributedShard(path, "", entries, parts)


def _shape(parts: Iterable[_Part]) -> tuple[int, ...]:
    """That of the tensor that parts make; the format does not say it."""
    return tuple(
        max(ends) for ends in zip(*(map(sum, zip(p.offsets, p.sizes, strict=True)) for p in parts), strict=True)
    )
