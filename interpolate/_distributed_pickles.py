"""The pickles in a folder of `torch.distributed.checkpoint`: its index, and where in a file a tensor's elements are.

Only classes that hold data are let through, and no code is run.
"""

from __future__ import annotations

import io
import pathlib
import pickle
import zipfile
from collections import OrderedDict
from typing import IO, Any

import torch

from interpolate._places import opened
from interpolate._tensors import Entry
from interpolate.errors import CheckpointError


def read_index(path: str) -> Any:
    with opened(path) as file:
        try:
            index: Any = _IndexUnpickler(io.BytesIO(file.read())).load()
            assert index.state_dict_metadata.keys() >= {place.fqn for place in index.storage_data}
        except OSError:
            raise
        except Exception as error:  # damaged pickles raise whatever their bytes happen to mean
            reason = f": {error}" if isinstance(error, pickle.UnpicklingError) else ""
            raise CheckpointError(
                f"{path} can't be read as the index that torch.distributed.checkpoint writes{reason}."
            ) from error
    return index


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("pathlib"):
            return pathlib.PurePosixPath  # of any system; it is where the folder was when it was written
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and (name == "Size" or isinstance(getattr(torch, name, None), torch.dtype)):
            return getattr(torch, name)
        if (module, name) == ("torch.serialization", "_get_layout"):
            return torch.serialization._get_layout
        if module == "torch.distributed.checkpoint.metadata" and name in _INDEX_CLASSES:
            from torch.distributed.checkpoint import metadata  # takes a while

            return getattr(metadata, name)
        if (module, name) == ("torch.distributed.checkpoint.filesystem", "_StorageInfo"):
            from torch.distributed.checkpoint.filesystem import _StorageInfo

            return _StorageInfo
        raise pickle.UnpicklingError(f"it holds a {module}.{name}, and code of files is never run here")


_INDEX_CLASSES = {
    *("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "_MEM_FORMAT_ENCODING"),
    *("TensorStorageMetadata", "ChunkStorageMetadata", "BytesStorageMetadata"),
}


def elements_of(file: IO[bytes], path: str, start: int, length: int, entry: Entry) -> int | None:
    """Where the elements of a tensor in a file of `torch.save` begin, None if they do not stand there in order."""
    try:
        with zipfile.ZipFile(io.BufferedReader(Window(file, start, length))) as archive:
            (pickled,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
            layout = _LayoutUnpickler(io.BytesIO(archive.read(pickled))).load()
            (record,) = (i for i in archive.infolist() if "/data/" in i.filename)
    except (pickle.UnpicklingError, ValueError):
        return None  # a tensor of another kind; torch.load knows it, or says that it does not
    except (zipfile.BadZipFile, EOFError) as error:
        raise CheckpointError(f"{path} is cut off or damaged; fetch or write it again.") from error
    if layout != (entry.shape, _strides(entry.shape)) or record.file_size != entry.n_bytes:
        return None
    file.seek(start + record.header_offset + 26)
    name, extra = (int.from_bytes(file.read(2), "little") for _ in range(2))
    return start + record.header_offset + 30 + name + extra


def _strides(sizes: tuple[int, ...]) -> tuple[int, ...]:
    return torch.empty(sizes, device="meta").stride()


class _LayoutUnpickler(pickle.Unpickler):
    """Gives the size and strides of a tensor that begins at the beginning of its storage."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch._utils" and name in ("_rebuild_tensor_v2", "_rebuild_tensor_v3"):
            return lambda storage, offset, size, stride, *_: None if offset else (size, stride)
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module in ("torch", "torch.storage") and (name.endswith("Storage") or hasattr(torch, name)):
            return name
        raise pickle.UnpicklingError(name)

    def persistent_load(self, pid: Any) -> None:
        return None


class Window(io.RawIOBase):
    """A stretch of a file, read as a file of its own."""

    def __init__(self, file: IO[bytes], start: int, length: int) -> None:
        self._file, self._start, self._length, self._at = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._start + self._at)
        data = self._file.read(max(0, min(len(buffer), self._length - self._at)))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)
