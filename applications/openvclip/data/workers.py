"""Processes that read videos: what hangs or crashes one of them costs that video, and nothing else."""

from __future__ import annotations

import atexit
import fcntl
import multiprocessing
import os
import pickle
import queue
import signal
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Generic, TypeVar

from applications.openvclip.data.decode import VideoReadError

_REQUESTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_LONGEST_POLL_S = 2_000_000.0
"""The system counts milliseconds in 31 bits; a longer time limit is none."""

Key = TypeVar("Key")
Value = TypeVar("Value")


class WorkerError(RuntimeError):
    """A reading process could not start, or met a mistake of the program; the message holds its traceback."""


class Workers(Generic[Key, Value]):
    """A pool of processes that apply a function to keys; use it in a `with` block.

    PyTorch's `DataLoader` ends with the first worker that dies, and waits forever for one that hangs. Here each task
    runs under a time limit, whatever C code is doing; a worker that is gone is replaced, and its task comes back as a
    `VideoReadError`. So does a `VideoReadError` of the function; everything else that it raises is a mistake of the
    program and ends the run. The end of the block ends all processes at once, also those that are busy, and so does
    the end of this process, however it comes.

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
        context = _context(function.__class__.__module__)
        pickled = pickle.dumps(function)  # once: it may hold a manifest of millions of rows
        self._workers = [_Worker(context, pickled, time_limit_s) for _ in range(n)]
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._threads = ThreadPoolExecutor(n)

    def __enter__(self) -> Workers[Key, Value]:
        atexit.register(self._end)  # where the block is never left; Python itself would ask them to stop, and wait
        for worker in self._workers:
            worker.start()
            self._idle.put(worker)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        atexit.unregister(self._end)
        self._end()
        self._threads.shutdown(cancel_futures=True)
        for worker in self._workers:
            worker.bury()

    def _end(self) -> None:
        for worker in self._workers:
            worker.end()

    def map(self, keys: Iterable[Key], ahead: int | None = None) -> Iterator[Value | VideoReadError]:
        """The function's values in the order of the keys, worked out up to `ahead` keys before they are asked for.

        Yields:
            For each key its value, or the error that says why its video could not be read.

        Raises:
            WorkerError: A process can't start, or the function raised something else.
        """
        ahead = 4 * len(self._workers) if ahead is None else ahead
        pending: deque[Future] = deque()
        try:
            for key in keys:
                pending.append(self._threads.submit(self.ask, key))
                if len(pending) > ahead:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()

    def ask(self, key: Key) -> Value | VideoReadError:
        """The function's value for one key, by the next process that is free."""
        worker = self._idle.get()
        try:
            return worker.ask(key)
        finally:
            self._idle.put(worker)


def start_early(module: str) -> None:
    """Start the server that forks workers, which takes seconds, while this process does something else meanwhile.

    Args:
        module: That of the function that the workers will apply.
    """
    _context(module)
    with _deaf_to_requests():
        forkserver.ensure_running()


def _context(module: str) -> Any:
    """Workers are forked from a server that has no threads and no CUDA, so that neither can be inherited broken."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", module, __name__])
    return context


class _Worker:
    """A process, and the next one in its place when it is gone."""

    def __init__(self, context: Any, function: bytes, time_limit_s: float) -> None:
        self._context = context
        self._function = function
        self._time_limit_s = time_limit_s
        self._running: tuple[Any, Connection] | None = None
        self._is_ready = False
        self._has_ended = False
        self._lock = threading.Lock()  # none is started after the end

    def start(self) -> None:
        with self._lock:
            if self._has_ended:
                raise WorkerError("the pool has ended.")
            try:
                connection, theirs = self._context.Pipe()
                process = self._context.Process(target=_serve, args=(theirs,), daemon=True, name="video reader")
                with _deaf_to_requests():
                    process.start()
                theirs.close()
                self._running, self._is_ready = (process, connection), False
            except (EOFError, ConnectionError) as error:  # the server that forks them is gone
                raise WorkerError(_cannot_start(repr(error))) from error
        with suppress(ConnectionError):  # `ask` finds it gone, and why
            connection.send_bytes(self._function)

    def ask(self, key: Any) -> Any:
        if self._running is None:
            self.start()
        assert self._running is not None
        process, connection = self._running
        try:
            if not self._is_ready:
                _content(connection.recv())
                self._is_ready = True
            connection.send(key)
            if connection.poll(self._time_limit_s if self._time_limit_s < _LONGEST_POLL_S else None):
                return _content(connection.recv())
        except (EOFError, ConnectionError):
            fate = self.bury()
            if not self._is_ready:
                raise WorkerError(_cannot_start(fate)) from None
            return VideoReadError(f"{key}: reading it ended the process that did it ({fate}).")
        process.kill()
        self.bury()
        return VideoReadError(f"{key}: not read within {self._time_limit_s:g} s; the reader was stopped.")

    def end(self) -> None:
        """End the process, also in the midst of a task, and let none take its place."""
        with self._lock:
            self._has_ended = True
            if running := self._running:
                running[0].kill()

    def bury(self) -> str:
        """End the process if it has not ended, and say how it did."""
        if self._running is None:
            return "not started"
        process, connection = self._running
        process.join(timeout=0.2)  # the pipe of a process that exits closes a little earlier than it is gone
        process.kill()
        process.join()
        connection.close()
        self._running = None
        code = process.exitcode
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _cannot_start(fate: str) -> str:
    return f"a process that reads videos could not start ({fate}); what it printed says why."


def _content(answer: tuple[str, Any]) -> Any:
    kind, content = answer
    if kind == "mistake":
        raise WorkerError(f"in a process that reads videos:\n{content}")
    return VideoReadError(content) if kind == "unreadable" else content


@contextmanager
def _deaf_to_requests() -> Iterator[None]:
    """What is started in the block, the server too, does not receive signals that ask to stop.

    They are sent to all processes of a group or a job, and the one that trains is to end its step with the videos of
    its workers; then it ends them. A blocked signal is inherited, and so leaves no time in which it would be heard.
    """
    former = signal.pthread_sigmask(signal.SIG_BLOCK, _REQUESTS)
    try:
        resource_tracker.ensure_running()  # it unblocks some of them in this thread
        signal.pthread_sigmask(signal.SIG_BLOCK, _REQUESTS)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)


def _serve(connection: Connection) -> None:
    """Take the function, then keys, and answer each until the other end closes. What was raised travels as text:
    not every exception can be pickled, and fewer can be unpickled."""
    _end_with_the_parent()
    function: Callable[[Any], Any] | None = None
    with suppress(EOFError, ConnectionError):  # whoever asked is gone
        while True:
            message = connection.recv_bytes()
            try:
                if function is None:
                    function, value = pickle.loads(message), None  # noqa: S301 from the process that started this one
                    if torch := sys.modules.get("torch"):  # the function's, which may do without
                        torch.set_num_threads(1)
                else:
                    value = function(pickle.loads(message))  # noqa: S301 likewise
                connection.send(("value", value))
            except VideoReadError as error:
                connection.send(("unreadable", str(error)))
            except BaseException:  # noqa: BLE001 it is raised again by the process that asked
                connection.send(("mistake", traceback.format_exc()))


def _end_with_the_parent() -> None:
    """Have the kernel end this process when the one that started it is gone, even if C code holds it at that time.

    The sentinel is a pipe of which only the parent holds the other end. The death signal of prctl would not do: the
    parent there is the server that forks, which lives as long as a worker.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    sentinel: int = parent.sentinel  # pyright: ignore[reportAttributeAccessIssue] typeshed lacks it
    signal.signal(signal.SIGIO, signal.SIG_DFL)
    fcntl.fcntl(sentinel, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(sentinel, fcntl.F_SETFL, fcntl.fcntl(sentinel, fcntl.F_GETFL) | os.O_ASYNC)
    if not parent.is_alive():  # it ended before the signal was set
        os._exit(1)
