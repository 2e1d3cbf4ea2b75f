"""Processes that read videos: what hangs or crashes one of them costs that video, and nothing else."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import queue
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Generic, TypeVar

from applications.openvclip.data.decode import VideoReadError

Key = TypeVar("Key")
Value = TypeVar("Value")

_TIMED_OUT = 1
"""Exit code of a process whose task took too long; `faulthandler` leaves no choice."""


class Workers(Generic[Key, Value]):
    """A pool of processes that apply a function to keys; use it in a `with` block.

    PyTorch's `DataLoader` ends with the first worker that dies, and waits forever for one that hangs. Here each task
    runs under a time limit that the worker's own watchdog enforces, whatever C code is doing; a worker that is gone is
    replaced, and its task comes back as a `VideoReadError`.

    Args:
        function: Picklable; called in the processes.
        n: Number of processes, at least 1.
        time_limit_s: Seconds that one task may take.

    Raises:
        ValueError: `n` or `time_limit_s` is not positive.
    """

    def __init__(self, function: Callable[[Key], Value], n: int, time_limit_s: float) -> None:
        if n < 1:
            raise ValueError(f"workers must be at least 1, got {n}: the time limit on a video needs a process to end.")
        if not time_limit_s > 0:
            raise ValueError(f"the time limit must be positive, got {time_limit_s} s.")
        self.function = function
        self.n = n
        self.time_limit_s = time_limit_s
        # workers are forked from a server that has no threads and no CUDA, so that neither can be inherited broken
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["__main__", function.__class__.__module__, __name__])
        self._idle: queue.SimpleQueue[_Process] = queue.SimpleQueue()
        self._threads = ThreadPoolExecutor(n)

    def __enter__(self) -> Workers[Key, Value]:
        for _ in range(self.n):
            self._idle.put(self._start())
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._threads.shutdown(wait=error is None, cancel_futures=True)
        while not self._idle.empty():
            self._idle.get().stop()

    def map(self, keys: Iterable[Key], ahead: int | None = None) -> Iterator[Value | VideoReadError]:
        """The function's values in the order of the keys, worked out up to `ahead` keys before they are asked for.

        Yields:
            For each key its value, or the error that says why its video could not be read.

        Raises:
            Exception: Any other error of the function.
        """
        ahead = 4 * self.n if ahead is None else ahead
        pending: deque[Future] = deque()
        for key in keys:
            pending.append(self._threads.submit(self.ask, key))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()

    def ask(self, key: Key) -> Value | VideoReadError:
        """The function's value for one key, by the next process that is free."""
        process = self._idle.get()
        try:
            process.connection.send(key)
            succeeded, value = process.connection.recv()
        except (EOFError, ConnectionError):
            error = self._post_mortem(process, key)
            process = self._start()
            return error
        finally:
            self._idle.put(process)
        if not succeeded and not isinstance(value, VideoReadError):
            raise value
        return value

    def _start(self) -> _Process:
        ours, theirs = self._context.Pipe()
        worker = self._context.Process(
            target=_serve, args=(theirs, self.function, self.time_limit_s), daemon=True, name="video reader"
        )
        worker.start()
        theirs.close()
        return _Process(worker, ours)

    def _post_mortem(self, process: _Process, key: Key) -> VideoReadError:
        process.stop()
        code = process.worker.exitcode
        if code == _TIMED_OUT:
            return VideoReadError(f"{key}: not read within {self.time_limit_s:g} s; the reader was stopped.")
        name = signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
        return VideoReadError(f"{key}: reading it ended the process that did it ({name}).")


class _Process:
    def __init__(self, worker: Any, connection: Connection) -> None:
        self.worker = worker
        self.connection = connection

    def stop(self) -> None:
        self.connection.close()
        self.worker.join(timeout=5)
        if self.worker.is_alive():
            self.worker.kill()
            self.worker.join()


def _serve(connection: Connection, function: Callable[[Any], Any], time_limit_s: float) -> None:
    """Answer keys with (True, value) or (False, error) until the other end closes."""
    import torch

    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupted run closes the connection
    with open(os.devnull, "w") as nowhere:
        while True:
            try:
                key = connection.recv()
                # a thread of C code, which neither a hanging library nor the interpreter's lock can hold up
                faulthandler.dump_traceback_later(time_limit_s, exit=True, file=nowhere)
                answer = _answer(function, key)
                faulthandler.cancel_dump_traceback_later()
                connection.send(answer)
            except (EOFError, ConnectionError):  # whoever asked is gone
                return


def _answer(function: Callable[[Any], Any], key: Any) -> tuple[bool, Any]:
    try:
        return True, function(key)
    except Exception as error:  # noqa: BLE001 it is raised again, or counted, by the process that asked
        return False, error
