"""Files and folders written whole or not at all: what was there before stays until the new is on the disk."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

import fsspec
from fsspec.implementations.local import LocalFileSystem


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file to write, which gets its name, in place of what had it, when the block ends well and it is on the disk."""
    with replaced_path(os.fspath(path)) as temporary, flushed(temporary) as file:
        yield file


@contextmanager
def flushed(path: str) -> Iterator[BinaryIO]:
    """A new file, on the disk when the block ends."""
    with open(path, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def replaced_path(path: str, folder: bool = False) -> Iterator[str]:
    """A temporary name beside the target, moved to it in one step if the block succeeds, and removed if it doesn't."""
    fs, target = fsspec.core.url_to_fs(path)
    is_local = isinstance(fs, LocalFileSystem)
    parent = (os.path.dirname(target) or ".") if is_local else None
    with tempfile.TemporaryDirectory(prefix=".interpolate-", dir=parent) as scratch:
        temporary = os.path.join(scratch, "new")
        if folder:
            os.mkdir(temporary)
        yield temporary
        if is_local:
            os.replace(temporary, target)
            _sync_folder(parent)
        else:
            fs.put(temporary, target, recursive=folder)


def _sync_folder(path: str | None) -> None:
    descriptor = os.open(path or ".", os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
