"""Processes that read videos: what hangs or crashes costs one video, what is our mistake ends the run, none is left."""

import ctypes
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from applications.openvclip.data.decode import VideoReadError
from applications.openvclip.data.workers import WorkerError, Workers


class UnpicklableError(Exception):
    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.lock = threading.Lock()


class UnpicklableVideoReadError(VideoReadError):
    def __init__(self, path: str, reason: str) -> None:  # pickles, but can't be made again from its one argument
        super().__init__(f"{path}: {reason}")


@dataclass(frozen=True)
class Misbehave:
    """Does to a reading process what broken files do to a library of C code."""

    def __call__(self, key: str) -> object:
        match key:
            case "hang":
                ctypes.CDLL(None).sleep(3600)
            case "hang with the lock":
                ctypes.PyDLL(None).sleep(3600)  # C code that never lets the interpreter run again
            case "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            case "crash":
                os.kill(os.getpid(), signal.SIGSEGV)
            case "exit 7" | "exit 1":
                os._exit(int(key[-1]))
            case "bad video":
                raise UnpicklableVideoReadError("bad.mp4", "bad")
            case "bug":
                raise KeyError("a mistake of ours")
            case "unpicklable error":
                raise UnpicklableError("a.mp4", "strange")
            case "unpicklable value":
                return key, threading.Lock()
            case "failed import":
                import no_such_package  # noqa: F401  # pyright: ignore[reportMissingImports] that is the point
            case "leave":
                sys.exit(3)
        return key, os.getpid()


@dataclass(frozen=True)
class Unloadable:
    """A function that a process can't make again."""

    def __reduce__(self) -> tuple:
        return os.stat, ("/no such folder",)

    def __call__(self, key: str) -> str:
        return key


def is_running(pid: int) -> bool:
    """A process that has ended and waits for its parent to take note does not run."""
    with suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def wait_for_the_end_of(pids: Iterable[int], within_s: float) -> None:
    deadline = time.monotonic() + within_s
    while alive := [pid for pid in pids if is_running(pid)]:
        assert time.monotonic() < deadline, f"reading processes outlive their pool: {alive}"
        time.sleep(0.02)


def test_what_hangs_or_crashes_is_reported_and_the_rest_goes_on() -> None:
    bad = ["hang", "crash", "hang with the lock", "exit 7", "exit 1", "stop", "bad video"]
    keys = [key for i, name in enumerate(bad) for key in (str(i), name)] + [*map(str, range(len(bad), 30))]
    with Workers(Misbehave(), 2, time_limit_s=1.5) as pool:
        values = list(pool.map(keys))
    errors = {key: str(value) for key, value in zip(keys, values, strict=True) if isinstance(value, VideoReadError)}
    assert errors == {
        "hang": "hang: not read within 1.5 s; the reader was stopped.",
        "hang with the lock": "hang with the lock: not read within 1.5 s; the reader was stopped.",
        "stop": "stop: not read within 1.5 s; the reader was stopped.",
        "crash": "crash: reading it ended the process that did it (SIGSEGV).",
        "exit 7": "exit 7: reading it ended the process that did it (exit code 7).",
        "exit 1": "exit 1: reading it ended the process that did it (exit code 1).",
        "bad video": "bad.mp4: bad",
    }
    read = [value[0] for value in values if isinstance(value, tuple)]
    assert read == [key for key in keys if key not in errors]


@pytest.mark.parametrize("time_limit_s", [3e6, float("inf")])
def test_a_time_limit_may_be_longer_than_the_system_can_wait(time_limit_s: float) -> None:
    with Workers(Misbehave(), 1, time_limit_s) as pool:
        assert not any(isinstance(value, VideoReadError) for value in pool.map(["0", "1"]))


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("bug", r"(?s)Traceback .*test_workers\.py.* in __call__.*KeyError: 'a mistake of ours'"),
        ("unpicklable error", r"UnpicklableError: a\.mp4: strange"),
        ("unpicklable value", r"TypeError: cannot pickle '_thread\.lock' object"),
        ("failed import", r"ModuleNotFoundError: No module named 'no_such_package'"),
        ("leave", r"SystemExit: 3"),
    ],
)
def test_a_mistake_of_the_program_ends_the_run_with_its_traceback(key: str, message: str) -> None:
    with Workers(Misbehave(), 1, time_limit_s=30) as pool:
        values = pool.map(["0", key, "1"])
        assert next(values)
        with pytest.raises(WorkerError, match=message):
            next(values)


def test_a_process_that_cannot_start_ends_the_run_with_the_reason() -> None:
    with (
        Workers(Unloadable(), 1, time_limit_s=30) as pool,
        pytest.raises(WorkerError, match=r"FileNotFoundError: .*'/no such folder'"),
    ):
        list(pool.map(["0"]))


def script(tmp_path: Path, body: str) -> list[str]:
    lines = [
        "import ctypes, os, signal, sys, time",
        "from applications.openvclip.data.workers import Workers",
        "class Hang:",
        "    def __call__(self, key):",
        "        print(os.getpid(), flush=True)",
        "        ctypes.PyDLL(None).sleep(3600)",
        'if __name__ == "__main__":',
        *(f"    {line}" for line in body.splitlines()),
    ]
    path = tmp_path / "script.py"
    path.write_text("\n".join(lines))
    return [sys.executable, str(path)]


def test_a_script_that_a_process_cannot_import_ends_with_the_reason(tmp_path: Path) -> None:
    """Each worker imports the script that started it."""
    command = script(tmp_path, "with Workers(Hang(), 1, 60) as pool:\n    print(list(pool.map(['a'])))")
    with open(command[-1], "a") as file:
        file.write("\nelse:\n    raise LookupError('no second time')\n")
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1
    assert "WorkerError: a process that reads videos could not start" in done.stderr
    assert "LookupError: no second time" in done.stderr


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_no_process_outlives_the_one_that_started_it(tmp_path: Path, ending: signal.Signals) -> None:
    """Whichever way it ends, while C code hangs in its workers and holds their interpreters' locks."""
    command = script(tmp_path, "with Workers(Hang(), 2, 3000) as pool:\n    print(list(pool.map(['a', 'b'])))")
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as run:
        assert run.stdout is not None
        pids = [int(run.stdout.readline()) for _ in range(2)]
        run.send_signal(ending)
        wait_for_the_end_of(pids, within_s=300)
        run.wait(timeout=300)


def test_signals_to_all_processes_are_for_the_one_that_started_them(tmp_path: Path) -> None:
    """As terminals and schedulers send them: the videos of the step that is under way are still read."""
    requests = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]
    command = script(
        tmp_path,
        "noted = []\n"
        f"for number in {[*map(int, requests)]}:\n"
        "    signal.signal(number, lambda number, frame: noted.append(number))\n"
        "with Workers(str, 2, 60) as pool:\n"
        f"    for _ in range({len(requests)}):\n"
        "        print(*pool.map(map(str, range(8))), flush=True)\n"
        "        sys.stdin.readline()\n"
        "print(noted)",
    )
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as run:
        assert run.stdout is not None
        assert run.stdin is not None
        for request in requests:
            assert run.stdout.readline() == "0 1 2 3 4 5 6 7\n"
            os.killpg(run.pid, request)
            time.sleep(0.2)  # whoever dies of it is dead
            run.stdin.write("\n")
            run.stdin.flush()
        assert run.stdout.readline() == f"{[*map(int, requests)]}\n"
        assert run.wait(300) == 0


def test_a_pool_that_is_never_left_does_not_keep_its_process_from_ending(tmp_path: Path) -> None:
    command = script(tmp_path, "pool = Workers(str, 2, 60).__enter__()\nprint(list(pool.map(['a'])))\n1 / 0")
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr


@pytest.mark.parametrize("leave", ["at the end", "by an exception", "by closing the generator"])
def test_busy_processes_end_with_the_pool(leave: str) -> None:
    pids: list[int] = []

    def use() -> None:
        with Workers(Misbehave(), 3, time_limit_s=300) as pool:
            values = pool.map(["0", "hang", "hang with the lock"], ahead=2)
            assert next(values)
            time.sleep(0.5)  # both hang by now
            pids.extend(c.pid or 0 for c in multiprocessing.active_children() if c.name == "video reader")
            if leave == "by an exception":
                raise ZeroDivisionError
            if leave == "by closing the generator":
                values.close()  # pyright: ignore[reportAttributeAccessIssue] it is a generator

    begun = time.monotonic()
    with suppress(ZeroDivisionError):
        use()
    assert len(pids) == 3
    wait_for_the_end_of(pids, within_s=2)
    assert time.monotonic() - begun < 60  # neither the time limit nor the hour of the sleep


@pytest.mark.parametrize(("n", "limit", "message"), [(0, 1.0, "at least 1, got 0"), (1, 0.0, "positive, got 0")])
def test_impossible_pools_are_refused(n: int, limit: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Workers(Misbehave(), n, limit)
