"""Checkpoints on disk or behind an fsspec URL, read and written piece by piece.

`PATH` is a `.safetensors` file; a file of `torch.save` (`.pt`, `.pth`, `.pyth`, `.ckpt`, `.bin`), which is unpickled
with `weights_only=True`; a TorchScript archive under one of these names, whose code is left alone; the `.index.json` of
either kind in shards; or a folder with one of these, as Hugging Face's are; or one that
`torch.distributed.checkpoint` wrote, on any number of processes. `PATH::KEY` picks one of several sets of weights in a
file of `torch.save` or such a folder, for instance `last.ckpt::current_model_state`, or
`last.ckpt::callbacks.EMA.weights` for one that lies deeper.
"""

from __future__ import annotations

import hashlib
import json
import os
import posixpath
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from threading import Event
from typing import Any

import torch
from torch import Tensor

from interpolate._distributed import DistributedShard, distributed_folder, distributed_safetensors
from interpolate._names import bare
from interpolate._pickled import PickledShard
from interpolate._pickling import write_pickled
from interpolate._places import (
    DISTRIBUTED_INDEX,
    INDEX,
    PICKLED,
    SAFETENSORS,
    base_name,
    beside,
    file_system,
    in_folder,
    name_of,
    opened,
    split_key,
)
from interpolate._safetensors import SafetensorsShard, parsed, write_safetensors
from interpolate._tensors import CHUNK, Entry, spans
from interpolate.atomic import flushed, replaced_path
from interpolate.errors import CheckpointError

_Shard = SafetensorsShard | PickledShard | DistributedShard

__all__ = ["CHUNK", "Checkpoint", "CheckpointError", "Entry", "write"]


class Checkpoint:
    """An open checkpoint: `entries` by bare name, without what DDP, `torch.compile` and the like put into names.

    One of its files is open at a time, whatever their number.

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
        path, self.key = split_key(os.fspath(path))
        self.path = in_folder(path)
        self.index: dict[str, Any] = {}
        """Of a sharded checkpoint: what its index file holds."""
        self._shards: dict[str, _Shard] = {}
        self._open: _Shard | None = None
        self._lock = threading.Lock()
        if self.is_sharded:
            entries = self._read_index()
        else:
            shard = self._shard(self.path, self.key)
            self._shards[base_name(self.path)] = self._open = shard
            entries = shard.entries
            self.key = shard.key
        self.metadata: dict[str, str] = {}
        for shard in self._shards.values():
            self.metadata |= shard.metadata
        self.stored_names = bare({name: name for name in entries})
        """The names in the file, by name."""
        self.entries = {name: entries[stored] for name, stored in self.stored_names.items()}

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        with self._lock:
            if self._open is not None:
                self._open.close()

    @property
    def is_sharded(self) -> bool:
        return name_of(self.path).endswith(INDEX)

    @property
    def files(self) -> list[str]:
        """Every file that belongs to the checkpoint."""
        return [
            *([self.path] if self.is_sharded else []),
            *(file for shard in self._shards.values() for file in shard.files),
        ]

    @property
    def rest(self) -> list[str]:
        """What the file holds beside `entries`: other sets of weights, hyperparameters, what is not a tensor."""
        shards = self._shards.values()
        counters = {name for shard in shards for name in shard.entries} - {*self.stored_names.values()}
        return [*sorted(counters), *(name for shard in shards for name in shard.rest)]

    def rename(self, names: Mapping[str, str]) -> None:
        """Go by other names, such as those of another checkpoint; what has none is left out."""
        self.entries = {names[name]: entry for name, entry in self.entries.items() if name in names}
        self.stored_names = {names[name]: stored for name, stored in self.stored_names.items() if name in names}

    def tensor(self, name: str) -> Tensor:
        """A whole tensor."""
        return torch.cat([*self.chunks(name)]).reshape(self.entries[name].shape)

    def chunks(self, name: str) -> Iterator[Tensor]:
        """The tensor's elements in order, in one-dimensional pieces of at most `CHUNK`; at least one piece.

        Several readers may take turns, on several threads too.
        """
        shard, stored = self._shards[self.entries[name].shard], self.stored_names[name]
        for start, size in spans(self.entries[name].numel):
            with self._lock:
                if self._open is not shard:
                    if self._open is not None:
                        self._open.close()
                    self._open = shard
                piece = shard.read(stored, start, size)
            yield piece

    def tied(self) -> list[tuple[str, ...]]:
        """Names that share their memory, in groups; safetensors files keep no such ties."""
        names = {stored: name for name, stored in self.stored_names.items()}
        ties = (tuple(names[n] for n in tied if n in names) for shard in self._shards.values() for tied in shard.ties)
        return [tied for tied in ties if len(tied) > 1]

    def sha256(self, stopped: Event | None = None) -> str:
        """The hash of the file; of a sharded checkpoint, that of the hashes of its index and shards in order.

        Args:
            stopped: Set it to have this end soon, with a `CheckpointError`.
        """
        digests = [_sha256(file, stopped) for file in self.files]
        return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()

    def _shard(self, path: str, key: str = "") -> _Shard:
        if base_name(path) == DISTRIBUTED_INDEX:
            return distributed_folder(path, key)
        if not name_of(path).endswith(SAFETENSORS):
            return PickledShard(path, key)
        if key:
            raise CheckpointError(
                f"{path} is one set of weights, and has no {key!r}; keys are for files of torch.save."
            )
        return distributed_safetensors(path) or SafetensorsShard(path)

    def _read_index(self) -> dict[str, Entry]:
        if self.key:
            raise CheckpointError(f"{self.path} is one set of weights, and has no {self.key!r}; leave the key away.")
        with opened(self.path) as file:
            self.index = parsed(file.read(), self.path)
        weight_map = self.index.get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
            raise CheckpointError(f"{self.path} has no weight_map; it is not the index of a sharded checkpoint.")
        entries: dict[str, Entry] = {}
        for name in sorted(set(weight_map.values())):
            if posixpath.basename(name) != name:
                raise CheckpointError(f"{self.path}: the shard {name!r} must stand beside the index.")
            shard = self._shards[name] = self._shard(beside(self.path, name))
            shard.close()
            entries |= shard.entries
        missing = [n for n, shard in weight_map.items() if n not in self._shards[shard].entries]
        unlisted = [n for shard in self._shards for n in self._shards[shard].entries if weight_map.get(n) != shard]
        if missing:
            raise CheckpointError(f"{self.path}: {len(missing)} tensors are not in their shards ({missing[0]}, …).")
        if unlisted:
            raise CheckpointError(
                f"{self.path}: {len(unlisted)} tensors in the shards aren't listed ({unlisted[0]}, …)."
            )
        return {name: entries[name] for name in weight_map}


def write(
    path: str | os.PathLike[str],
    source: Checkpoint,
    pieces: Callable[[str], Iterable[Tensor]],
    metadata: Callable[[bool], Mapping[str, str]],
) -> None:
    """Write a checkpoint with the names, shapes, dtypes and shards of another; all of it, or nothing at all.

    Args:
        path: A `.safetensors` file; a folder that does not exist yet if `source` is sharded; or a file of `torch.save`,
            which holds all else that `source` holds, if that is one too. Local or a URL.
        source: What to be like.
        pieces: The elements of a tensor in order. Called once for each name.
        metadata: Called with False before the pieces and with True after them, for what becomes known on the way;
            both times the same length.

    Raises:
        CheckpointError: The path is not of the kind that fits `source`.
        FileExistsError: The folder exists.
        FileNotFoundError: There is no folder for the file or folder to stand in.
        OSError: Writing failed; what was at `path` is still there.
    """
    path = os.fspath(path)
    names = {stored: name for name, stored in source.stored_names.items()}

    def write_shard(path: str, like: _Shard) -> None:
        """A file with those weights of the source that are in one of its files."""
        own = {stored: entry for stored, entry in like.entries.items() if stored in names}
        stored_pieces = lambda stored: pieces(names[stored])  # noqa: E731 # what the writers call a name
        if path.endswith(SAFETENSORS):
            write_safetensors(path, own, stored_pieces, lambda final: {**like.metadata, **metadata(final)})
        elif isinstance(like, PickledShard):
            content = like.content
            ties = [tied for tied in like.ties if all(name in own for name in tied)]
            write_pickled(path, content, {n: like.tensors[n] for n in own}, ties, stored_pieces, metadata)
        else:
            content = {n: torch.empty(e.shape, dtype=e.dtype, device="meta") for n, e in own.items()}
            write_pickled(path, content, content, [], stored_pieces, metadata)

    if source.is_sharded:
        if path.endswith((SAFETENSORS, INDEX, *PICKLED)):
            raise CheckpointError(f"{source.path} is sharded: the output must be a folder, got {path!r}.")
        fs, target = file_system(path)
        if fs.exists(target):
            raise FileExistsError(f"{path} exists; sharded checkpoints are written to new folders only.")
        index = base_name(source.path)
        with replaced_path(path, folder=True, last=index) as folder:
            for name, shard in source._shards.items():
                write_shard(os.path.join(folder, name), shard)
            with flushed(os.path.join(folder, index)) as file:
                file.write(json.dumps(source.index, indent=2).encode())
    elif path.endswith((SAFETENSORS, *PICKLED)):
        (shard,) = source._shards.values()
        with replaced_path(path) as temporary:
            write_shard(temporary, shard)
    else:
        raise CheckpointError(f"the output must end in .safetensors, {', '.join(PICKLED)}, got {path!r}.")


def _sha256(path: str, stopped: Event | None) -> str:
    digest, piece = hashlib.sha256(), memoryview(bytearray(1 << 18))  # small enough to stay in the processor's cache
    with opened(path) as file:
        while n := file.readinto(piece):
            digest.update(piece[:n])
            if stopped and stopped.is_set():
                raise CheckpointError(f"the hashing of {path} was stopped.")
    return digest.hexdigest()
