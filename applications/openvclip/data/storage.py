"""Files wherever they are: folders, and every URL that fsspec opens, the latter through a bounded cache on the disk."""

from __future__ import annotations

import codecs
import fcntl
import hashlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec


class FetchError(RuntimeError):
    """A remote file could not be had; the message names it and says why."""


_URL = re.compile(r"[a-z][a-z0-9+.-]*(::[a-z][a-z0-9+.-]*)*://", re.IGNORECASE)


def is_url(location: str) -> bool:
    """Whether it begins as a URL does; `12:30.mp4`, `a::b.mp4` and `x/a://b.mp4` are names of local files."""
    return _URL.match(location) is not None


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
    if not is_url(location):
        return os.path.exists(location)
    filesystem, path = filesystem_of(location)
    return filesystem.exists(path)


def is_folder(location: str) -> bool:
    if not is_url(location):
        return os.path.isdir(location)
    filesystem, path = filesystem_of(location)
    return filesystem.isdir(path)


def read_text(location: str) -> str:
    """The text of a file, in UTF-8 or, where a byte order mark says so, UTF-16; lines end in "\\n".

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is in another encoding.
    """
    try:
        if is_url(location):
            filesystem, path = filesystem_of(location)
            content: bytes = filesystem.cat_file(path)
        else:
            content = Path(location).read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"{location}: no such file.") from None
    encoding = "utf-16" if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{location}, line {line}: byte 0x{content[error.start]:02x} is not {encoding.removesuffix('-sig')}. Save "
            "the file as UTF-8, for example with `iconv -f latin1 -t utf-8`."
        ) from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def list_files(root: str) -> list[str]:
    """All files below a folder, as sorted paths relative to it; links are followed, hidden files are left out.

    Raises:
        FileNotFoundError: There is no such folder.
    """
    if not is_url(root):
        if not os.path.isdir(root):
            raise FileNotFoundError(f"{root}: no such folder.")
        return sorted(_local_files(root, "", frozenset()))
    filesystem, path = filesystem_of(root)
    if not filesystem.isdir(path):
        raise FileNotFoundError(f"{root}: no such folder.")
    path = path.rstrip("/")
    relative = (file[len(path) + 1 :] for file in filesystem.find(path))
    return sorted(file for file in relative if not any(part.startswith(".") for part in file.split("/")))


def _local_files(folder: str, prefix: str, above: frozenset[tuple[int, int]]) -> Iterator[str]:
    status = os.stat(folder)
    if (status.st_dev, status.st_ino) in above:  # a link to a folder that it lies in
        return
    above |= {(status.st_dev, status.st_ino)}
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                yield from _local_files(entry.path, f"{prefix}{entry.name}/", above)
            else:  # also a link to nothing: it is a video that can't be read, and counted as one
                yield prefix + entry.name


def list_names(folder: str) -> list[str]:
    """The names of what lies directly in a folder, sorted; none if it is not there."""
    if not is_url(folder):
        return sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    filesystem, path = filesystem_of(folder)
    return sorted(entry.rstrip("/").rpartition("/")[2] for entry in filesystem.ls(path, detail=False))


def filesystem_of(location: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, and what the location is called there.

    Raises:
        ValueError: It is no whole URL of a known kind, or the package for its kind is not installed.
    """
    try:
        return fsspec.core.url_to_fs(location)
    except (ImportError, ValueError, TypeError) as error:  # the last of a URL that lacks a part, as ftp:// its host
        raise ValueError(f"{location} can't be opened by fsspec: {error}.") from error


def cache_root() -> Path:
    """The folder of all that can be made or fetched again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "interpolate"


_PRIVATE = ".use-"
_LEFT_OVER_S = 24 * 3600.0
"""A private folder that is older belonged to a process that was killed: reading a video takes seconds."""


@dataclass(frozen=True)
class Cache:
    """Remote files on the local disk, up to a total size; the least recently used ones go first.

    Any number of processes may share the folder. A file in use stays readable when another process evicts it.
    """

    folder: Path = field(default_factory=lambda: cache_root() / "videos")
    max_bytes: int = 20 * 10**9
    decoded: Path | None = None
    """Where decoded frames are kept, of videos of this machine; None: nowhere."""

    @contextmanager
    def local(self, location: str) -> Iterator[Path]:
        """A local path with the content of `location`, for the length of a `with` block.

        Raises:
            FetchError: The file could not be fetched or kept.
        """
        if not is_url(location):
            yield Path(location)
            return
        with ExitStack() as stack:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                private = stack.enter_context(
                    tempfile.TemporaryDirectory(prefix=_PRIVATE, dir=self.folder, ignore_cleanup_errors=True)
                )
                path = self._kept(location, Path(private))
            except OSError as error:
                raise FetchError(f"{location}: could not be kept in {self.folder}. {error}") from error
            yield path

    def _kept(self, location: str, private: Path) -> Path:
        suffix = PurePosixPath(location).suffix
        cached = self.folder / (hashlib.sha256(location.encode()).hexdigest() + suffix)
        path = private / f"video{suffix}"
        try:
            path.hardlink_to(cached)
            os.utime(path)
        except FileNotFoundError:
            _fetch(location, path)
            if path.stat().st_size <= self.max_bytes:
                self._make_room(path.stat().st_size)
                entry = private / "entry"
                entry.hardlink_to(path)
                entry.replace(cached)
        return path

    def _make_room(self, n_bytes: int) -> None:
        """Make room for a file that is to come.

        The total stands in a file, so that the folder is walked only when it passes the bound, not at each fetch; it
        errs on the large side, and a walk puts it right.
        """
        with (self.folder / ".total").open("a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            noted = file.read()
            total = (int(noted) if noted.isdigit() else self._evict(self.max_bytes)) + n_bytes
            if total > self.max_bytes:
                total = self._evict(int(0.95 * self.max_bytes) - n_bytes) + n_bytes
            file.truncate(0)
            file.write(str(total))

    def _evict(self, max_bytes: int) -> int:
        """Remove the longest unused files until no more than this is left, and say how much is."""
        entries = []
        for path in self.folder.iterdir():
            try:
                status = path.stat()
            except FileNotFoundError:  # another process is done with it
                continue
            if path.name.startswith(_PRIVATE):
                if time.time() - status.st_mtime > _LEFT_OVER_S:
                    shutil.rmtree(path, ignore_errors=True)
            elif not path.name.startswith("."):
                entries.append((status.st_mtime_ns, status.st_size, path))
        total = sum(size for _, size, _ in entries)
        for _, size, path in sorted(entries):
            if total <= max_bytes:
                break
            path.unlink(missing_ok=True)
            total -= size
        return total


def _fetch(location: str, path: Path) -> None:
    try:
        filesystem, remote = filesystem_of(location)
        filesystem.get_file(remote, str(path))
    except Exception as error:
        raise FetchError(f"{location}: could not be fetched. {type(error).__name__}: {error}") from error
