"""Being asked to stop, by real signals to real processes."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from applications.openvclip.training.interruption import Interruption

_LOOP = """
import signal, time
from applications.openvclip.training.interruption import SIGNALS, Interruption
for number in SIGNALS:
    signal.signal(number, signal.SIG_DFL)  # whatever these tests were started by, such as nohup
with Interruption() as interruption:
    print("begun", flush=True)
    while interruption.signal is None:
        time.sleep(0.01)
    print(interruption.signal, flush=True)
    if {stubborn}:
        import ctypes
        mutex = ctypes.create_string_buffer(64)
        while True:  # the second time it waits in C code, which no signal interrupts
            ctypes.CDLL(None).pthread_mutex_lock(mutex)
"""


@contextmanager
def running(stubborn: bool) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", _LOOP.format(stubborn=stubborn)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP"])
def test_the_first_signal_lets_the_step_end(name: str) -> None:
    with running(stubborn=False) as process:
        process.send_signal(signal.Signals[name])
        assert process.communicate(timeout=300)[0] == f"{name}\n"
        assert process.returncode == 0


def test_the_second_ends_at_once_even_in_c_code_but_not_one_press_that_comes_twice() -> None:
    with running(stubborn=True) as process:
        assert process.stdout is not None
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "SIGINT\n"
        process.send_signal(signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(300) == 128 + signal.SIGTERM


def test_what_is_ignored_stays_so() -> None:
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with Interruption() as interruption:
            os.kill(os.getpid(), signal.SIGHUP)
            assert interruption.signal is None
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, former)


def test_the_former_handlers_come_back() -> None:
    former = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    descriptors = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with Interruption() as interruption:
            os.kill(os.getpid(), signal.SIGUSR1)
            assert interruption.signal == "SIGUSR1"
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)] == former
    deadline = time.monotonic() + 60
    while len(os.listdir("/proc/self/fd")) > descriptors:
        assert time.monotonic() < deadline
        time.sleep(0.01)
