"""Files and folders written whole or not at all: what was there before stays until the new is on the disk."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import escape, glob
from typing import BinaryIO

import fsspec
from fsspec.implementations.local import LocalFileSystem

_STAGING = ".interpolate-"


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
def replaced_path(path: str, folder: bool = False, last: str = "") -> Iterator[str]:
    """A temporary name of the same ending, moved to the target if the block succeeds, and removed if it doesn't.

    A local target is prepared in a folder beside it, and moved in one step; a link is followed. What goes to a URL is
    prepared in `TMPDIR`, or in /var/tmp, which is not kept in memory. Folders that killed processes left are removed.

    Args:
        path: The target, local or a URL.
        folder: Whether a folder is to be written; it exists already when the block begins.
        last: The file in it without which the others are nothing: it is uploaded last.

    Raises:
        FileNotFoundError: The folder in which the target is to stand does not exist.
        OSError: It can't be written, or uploaded.
    """
    fs, target = fsspec.core.url_to_fs(path)
    if not isinstance(fs, LocalFileSystem):
        with _staging(_for_uploads()) as scratch:
            yield (temporary := _new(scratch, target, folder))
            names = sorted(os.listdir(temporary), key=lambda name: (name == last, name)) if folder else [""]
            try:
                for name in names:
                    fs.put_file(os.path.join(temporary, name), f"{target}/{name}") if folder else fs.put_file(
                        temporary, target
                    )
            except OSError:
                raise
            except Exception as error:  # packages of protocols have errors of their own, of credentials for instance
                raise OSError(f"{path} can't be written to: {error}.") from error
        return
    target = os.path.realpath(target)
    parent = os.path.dirname(target)
    if os.path.isdir(target) and not folder:
        raise IsADirectoryError(f"{path} is a folder; give the name of a file to write.")
    if not os.path.isdir(parent):
        raise FileNotFoundError(f"there is no folder {parent} to write {path} into; make it first.")
    with _staging(parent) as scratch:
        yield (temporary := _new(scratch, target, folder))
        os.replace(temporary, target)
        _sync_folder(parent)


def _new(scratch: str, target: str, folder: bool) -> str:
    temporary = os.path.join(scratch, "new" + ("" if folder else os.path.splitext(target)[1]))
    if folder:
        os.mkdir(temporary)
    return temporary


def _for_uploads() -> str:
    chosen = any(os.environ.get(name) for name in ("TMPDIR", "TEMP", "TMP"))
    return "/var/tmp" if not chosen and os.access("/var/tmp", os.W_OK) else tempfile.gettempdir()  # noqa: S108 # with a random name


@contextmanager
def _staging(parent: str) -> Iterator[str]:
    """A folder of our own, locked for as long as this process lives, so that others know it for abandoned or not."""
    for path in glob(os.path.join(escape(parent), _STAGING + "*")):
        with suppress(OSError), _locked(path, wait=False) as is_ours:
            if is_ours:
                shutil.rmtree(path)
    while True:
        path = tempfile.mkdtemp(prefix=_STAGING, dir=parent)
        with _locked(path, wait=True):
            if not os.path.isdir(path):
                continue  # somebody took it for abandoned before it was locked
            try:
                yield path
            finally:
                shutil.rmtree(path, ignore_errors=True)  # what stays is swept next time
            return


@contextmanager
def _locked(folder: str, wait: bool) -> Iterator[bool]:
    """Lock a folder until the block or the process ends; False if it can't be, or is locked and not waited for.

    The lock is the kernel's on an open file: it can't outlive its process, and needs no process id, which would mean
    nothing on another machine that sees the same disk.
    """
    try:
        import fcntl
    except ImportError:  # on Windows nothing is swept
        yield False
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        yield False
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError:  # taken, or a file system without locks
            locked = False
        else:
            locked = True
        yield locked
    finally:
        os.close(descriptor)


def _sync_folder(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
