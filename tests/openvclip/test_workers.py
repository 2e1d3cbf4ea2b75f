"""Processes that read videos: what hangs or crashes costs one video, and nothing stalls."""

import ctypes
import os
import signal
import time
from dataclasses import dataclass

import pytest

from applications.openvclip.data.decode import VideoReadError
from applications.openvclip.data.workers import Workers


@dataclass(frozen=True)
class Misbehave:
    """Does to a reading process what broken files do to a library of C code."""

    def __call__(self, key: str) -> tuple[str, int]:
        if key == "hang":
            ctypes.CDLL(None).sleep(3600)
        if key == "hang with the lock":
            ctypes.PyDLL(None).sleep(3600)  # C code that never lets the interpreter run again
        if key == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        if key == "exit":
            os._exit(7)
        if key == "bad video":
            raise VideoReadError("bad.mp4: bad")
        if key == "bug":
            raise KeyError("a mistake of ours")
        return key, os.getpid()


def test_what_hangs_or_crashes_is_reported_and_the_rest_goes_on() -> None:
    keys = ["0", "hang", "1", "crash", "2", "hang with the lock", "exit", "3", "bad video", *map(str, range(4, 30))]
    with Workers(Misbehave(), 2, time_limit_s=1.5) as pool:
        values = list(pool.map(keys))
    errors = {key: str(value) for key, value in zip(keys, values, strict=True) if isinstance(value, VideoReadError)}
    assert errors == {
        "hang": "hang: not read within 1.5 s; the reader was stopped.",
        "hang with the lock": "hang with the lock: not read within 1.5 s; the reader was stopped.",
        "crash": "crash: reading it ended the process that did it (SIGSEGV).",
        "exit": "exit: reading it ended the process that did it (exit code 7).",
        "bad video": "bad.mp4: bad",
    }
    read = [value[0] for value in values if not isinstance(value, VideoReadError)]
    assert read == [key for key in keys if key not in errors]


def test_a_mistake_of_the_program_is_no_bad_video() -> None:
    with Workers(Misbehave(), 1, time_limit_s=30) as pool, pytest.raises(KeyError, match="a mistake of ours"):
        list(pool.map(["0", "bug", "1"]))


def test_processes_end_with_the_pool_even_where_one_hangs() -> None:
    with Workers(Misbehave(), 2, time_limit_s=30) as pool:
        pids = {pid for _, pid in pool.map(map(str, range(8)))}
    deadline = time.monotonic() + 10
    while any(os.path.exists(f"/proc/{pid}") for pid in pids):
        assert time.monotonic() < deadline, "a reading process outlives its pool"
        time.sleep(0.05)


@pytest.mark.parametrize(("n", "limit", "message"), [(0, 1.0, "at least 1, got 0"), (1, 0.0, "positive, got 0")])
def test_impossible_pools_are_refused(n: int, limit: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Workers(Misbehave(), n, limit)
