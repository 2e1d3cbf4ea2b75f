"""Where checkpoints lie: paths and URLs, `PATH::KEY`, and folders of Hugging Face."""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from interpolate.errors import CheckpointError

SAFETENSORS = ".safetensors"
PICKLED = ".pt", ".pth", ".pyth", ".ckpt", ".bin"
INDEX = ".index.json"

DISTRIBUTED_INDEX = ".metadata"
"""The index of a folder that `torch.distributed.checkpoint` wrote; what it is called makes it the last to appear."""
RANK_FILE = r"shard-(\d+)-model-(\d+)-of-(\d+)\.safetensors"
"""What one process writes of a checkpoint of all in safetensors; all together are one checkpoint."""

_IN_FOLDERS = (
    *(DISTRIBUTED_INDEX, "pytorch_model_fsdp_[0-9]*"),
    *(f"*{SAFETENSORS}{INDEX}", f"*{SAFETENSORS}", f"*.bin{INDEX}", "*_model.bin"),
)
"""What weights are called in folders that torch.distributed.checkpoint, accelerate, transformers, PEFT and diffusers
write; the first that is there is meant."""

_INSIDE_OTHERS = {
    *("zip", "tar", "libarchive", "dir", "reference", "async_wrapper"),
    *("simplecache", "filecache", "blockcache", "cached"),
}
"""File systems of fsspec that need another one: in `zip://a.pt::b.zip`, what follows is no key."""

_POINTER = b"version https://git-lfs.github.com/spec/"


def file_system(path: str) -> tuple[Any, str]:
    """The file system that a path or URL belongs to, and its name there.

    Raises:
        CheckpointError: The file system needs a package that is not installed.
    """
    if os.path.exists(path):  # whatever its name looks like
        return LocalFileSystem(), os.path.abspath(path)
    with _reached(path):
        return fsspec.core.url_to_fs(path)


@contextmanager
def _reached(path: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"there is no file {path}.") from error
    except OSError:
        raise
    except Exception as error:  # packages of protocols have errors of their own: of archives, of credentials
        raise CheckpointError(f"{path} can't be reached: {error}.") from error


def name_of(path: str) -> str:
    """The part of a chained URL that names the file itself; else the path.

    Example:
        >>> name_of("simplecache::zip://a.pt::b.zip")
        'zip://a.pt'
    """
    links = [] if os.path.exists(path) else path.split("::")
    return next((link for link in links if link not in _INSIDE_OTHERS), path)


def base_name(path: str) -> str:
    return posixpath.basename(name_of(path))


def beside(path: str, name: str) -> str:
    """Another file in the folder of a file.

    Example:
        >>> beside("zip://in/a.pt::b.zip", "c.pt")
        'zip://in/c.pt::b.zip'
    """
    own = name_of(path)
    return path.replace(own, own[: len(own) - len(posixpath.basename(own))] + name, 1)


def is_local(path: str) -> bool:
    return isinstance(file_system(path)[0], LocalFileSystem)


def opened(path: str) -> Any:
    """The file, open for reading.

    Raises:
        CheckpointError: It only points to the contents, which git-lfs has not fetched.
    """
    fs, target = file_system(path)
    with _reached(path):
        file = fs.open(target, "rb")
        start = file.read(len(_POINTER))
    if start == _POINTER:
        file.close()
        raise CheckpointError(f"{path} is a pointer of git-lfs, not the file itself; fetch it with `git lfs pull`.")
    file.seek(0)
    with suppress(AttributeError):
        file.kept_alive = fs  # fsspec closes an archive, under the files in it, when nobody holds its file system
    return file


def split_key(path: str) -> tuple[str, str]:
    """`PATH::KEY` as path and key; the key is empty if there is none.

    Example:
        >>> split_key("zip://last.ckpt::s3://bucket/runs.zip::state_dict")
        ('zip://last.ckpt::s3://bucket/runs.zip', 'state_dict')
        >>> split_key("zip://last.ckpt::runs.zip")
        ('zip://last.ckpt::runs.zip', '')
    """
    start, separator, last = path.rpartition("::")
    link = start.rpartition("::")[2]
    if not start or "://" in last or link.partition("://")[0] in _INSIDE_OTHERS or os.path.exists(path):
        return path, ""
    if separator and not last:
        raise CheckpointError(f"{path} ends without the key that '::' announces.")
    return start, last


def in_folder(path: str) -> str:
    """The checkpoint in a folder, if the path is one; else the path.

    Raises:
        CheckpointError: There is none in the folder, or one can't tell which is meant.
    """
    if name_of(path).endswith((SAFETENSORS, INDEX, DISTRIBUTED_INDEX, *PICKLED)) and not os.path.isdir(path):
        return path  # without asking a server
    fs, target = file_system(path)
    if not fs.isdir(target):
        return path
    names = sorted(posixpath.basename(name.rstrip("/")) for name in fs.ls(target, detail=False))
    for pattern in _IN_FOLDERS:
        found = [name for name in names if fnmatch(name, pattern)]
        found += [name for name in names if name + INDEX in found]  # of shards and a whole file one may be stale
        if len(found) == 1 or (found and all(re.fullmatch(RANK_FILE, name) for name in found)):
            return in_folder(f"{path.rstrip('/')}/{found[0]}")
        if found:
            raise CheckpointError(f"{path} holds several checkpoints ({', '.join(found[:5])}); name one of them.")
    there = ", ".join(names[:5]) or "nothing"
    raise CheckpointError(f"{path} is a folder without a checkpoint ({', '.join(_IN_FOLDERS)}); it holds {there}.")
