"""One run, one folder: a lock that says who holds it, and that nobody keeps who is gone."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_BEAT_S = 20.0
_GONE_S = 15 * _BEAT_S
"""Without a beat for so long the holder on another machine is gone."""


class LockedError(RuntimeError):
    """Another process is at work in the folder."""


@contextmanager
def locked(folder: Path) -> Iterator[str | None]:
    """Keep other processes from working in a folder for the length of a `with` block.

    The lock is a file, `.lock`, with the machine and the process that hold it, touched every 20 s while they live. It
    is taken over from a process that is gone: one of this machine that no longer runs, or one of another machine that
    has not touched it for five minutes, by the clock of the file system.

    Yields:
        Whose lock was taken over, as text; None if there was none.

    Raises:
        LockedError: Another process holds it; the message says which, and what to do.

    Example:
        >>> import tempfile
        >>> with locked(Path(tempfile.mkdtemp())) as former:
        ...     print(former)
        None
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, me = folder / ".lock", {"host": socket.gethostname(), "pid": os.getpid(), "started": _started(os.getpid())}
    former = None
    while not _created(path, me):
        holder = _holder(path)
        if holder is None:
            continue  # it has just been given back
        if _lives(path, holder):
            raise LockedError(
                f"{folder} is in use by process {holder['pid']} on {holder['host']}; wait for it or stop it, or choose "
                f"another folder. If you know that it is gone, delete {path}."
            )
        if _removed(path, holder):
            former = f"process {holder['pid']} on {holder['host']}, which is gone"
    ended = threading.Event()
    beating = threading.Thread(target=_beat, args=(path, ended), daemon=True, name="lock of the run's folder")
    beating.start()
    try:
        yield former
    finally:
        ended.set()
        beating.join()
        path.unlink(missing_ok=True)


def _created(path: Path, holder: dict[str, object]) -> bool:
    """Make the lock with its content in one step, unless there is one."""
    temporary = path.with_name(f".lock-{holder['host']}-{holder['pid']}")
    temporary.write_text(json.dumps(holder), encoding="utf-8")
    try:
        path.hardlink_to(temporary)
    except FileExistsError:
        return False
    finally:
        temporary.unlink()
    return True


def _holder(path: Path) -> dict[str, object] | None:
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
        return {name: holder[name] for name in ("host", "pid", "started")}
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError) as error:  # a machine that crashed may leave an empty file
        raise LockedError(
            f"{path} does not say which process holds {path.parent}; if you know that none does, delete it."
        ) from error


def _removed(path: Path, holder: dict[str, object]) -> bool:
    """Remove the lock of a holder who is gone, and not one that another process has put in its place meanwhile."""
    aside = path.with_name(f".lock-gone-{os.getpid()}")
    try:
        path.rename(aside)
    except FileNotFoundError:
        return False
    ours = _holder(aside) == holder
    if ours:
        aside.unlink()
    else:
        aside.rename(path)
    return ours


def _lives(path: Path, holder: dict[str, object]) -> bool:
    if holder["host"] == socket.gethostname():
        return _started(int(str(holder["pid"]))) == holder["started"]
    probe = path.with_name(f".lock-probe-{os.getpid()}")
    probe.touch()
    try:
        return probe.stat().st_mtime - path.stat().st_mtime < _GONE_S
    finally:
        probe.unlink()


def _started(pid: int) -> str | None:
    """When a process of this machine began, so that another one of the same number is told from it; None if gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        return None if fields[0] == "Z" else fields[19]
    except FileNotFoundError:
        pass
    if Path("/proc/self/stat").exists():
        return None
    try:
        os.kill(pid, 0)  # no /proc on this system: whether it runs is all that can be told
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return "running"


def _beat(path: Path, ended: threading.Event) -> None:
    while not ended.wait(_BEAT_S):
        try:
            os.utime(path)
        except OSError:  # whoever deleted it wanted to
            return
