"""Files wherever they are: folders, and every URL that fsspec opens, the latter through a bounded cache on the disk."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec


class FetchError(RuntimeError):
    """A remote file could not be had; the message names it and says why."""


def is_url(location: str) -> bool:
    return "://" in location


def join(root: str, path: str) -> str:
    """A path below a folder or URL; a path that is absolute or a URL itself stays what it is."""
    if is_url(path) or path.startswith("/") or not root:
        return path
    return f"{root.rstrip('/')}/{path}"


def parent(location: str) -> str:
    """The folder that a file lies in."""
    folder, slash, _ = location.rpartition("/")
    if folder.endswith(("/", ":")) or (slash and not folder):
        return folder + slash  # the root of a URL or of the disk
    return folder or "."


def exists(location: str) -> bool:
    filesystem, path = filesystem_of(location)
    return filesystem.exists(path)


def read_text(location: str) -> str:
    """The text of a file.

    Raises:
        FileNotFoundError: There is no such file.
    """
    filesystem, path = filesystem_of(location)
    try:
        return filesystem.cat_file(path).decode("utf-8")
    except FileNotFoundError:
        raise FileNotFoundError(f"{location}: no such file.") from None


def list_files(root: str) -> list[str]:
    """All files below a folder, as sorted paths relative to it; hidden ones are left out.

    Raises:
        FileNotFoundError: There is no such folder.
    """
    filesystem, path = filesystem_of(root)
    if not filesystem.isdir(path):
        raise FileNotFoundError(f"{root}: no such folder.")
    path = path.rstrip("/")
    relative = (file[len(path) + 1 :] for file in filesystem.find(path))
    return sorted(file for file in relative if not any(part.startswith(".") for part in file.split("/")))


def filesystem_of(location: str) -> tuple[Any, str]:
    """The fsspec file system of a path or URL, and what the location is called there.

    Raises:
        ImportError: The package that reads this kind of URL is not installed; the message names it.
    """
    return fsspec.core.url_to_fs(location)


def cache_root() -> Path:
    """The folder of all that can be made or fetched again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "interpolate"


@dataclass(frozen=True)
class Cache:
    """Remote files on the local disk, up to a total size; the least recently used ones go first.

    Any number of processes may share the folder. A file in use stays readable when another process evicts it.
    """

    folder: Path = field(default_factory=lambda: cache_root() / "videos")
    max_bytes: int = 20 * 10**9

    @contextmanager
    def local(self, location: str) -> Iterator[Path]:
        """A local path with the content of `location`, for the length of a `with` block.

        Raises:
            FetchError: The file could not be fetched.
        """
        if not is_url(location):
            yield Path(location)
            return
        suffix = Path(location).suffix
        cached = self.folder / (hashlib.sha256(location.encode()).hexdigest() + suffix)
        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".use-", dir=self.folder) as private:
            path = Path(private) / f"video{suffix}"
            try:
                path.hardlink_to(cached)
                os.utime(cached)
            except FileNotFoundError:
                _fetch(location, path)
                entry = Path(private) / "entry"
                entry.hardlink_to(path)
                entry.replace(cached)
                self._evict()
            yield path

    def _evict(self) -> None:
        entries = []
        for path in self.folder.iterdir():
            if not path.name.startswith("."):
                try:
                    status = path.stat()
                except FileNotFoundError:  # another process evicts at the same time
                    continue
                entries.append((status.st_mtime_ns, status.st_size, path))
        excess = sum(size for _, size, _ in entries) - self.max_bytes
        for _, size, path in sorted(entries):
            if excess <= 0:
                break
            path.unlink(missing_ok=True)
            excess -= size


def _fetch(location: str, path: Path) -> None:
    try:
        filesystem, remote = filesystem_of(location)
        filesystem.get_file(remote, str(path))
    except Exception as error:
        raise FetchError(f"{location}: could not be fetched. {type(error).__name__}: {error}") from error
