"""Being asked to stop: by a user, by a scheduler that pre-empts, or by torchrun."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
"""What terminals send for Ctrl-C; what torchrun, systemd and containers send; Slurm's `--signal=USR1`; and what a
terminal sends that is closed."""

_SAME_S = 1.0
"""A terminal's Ctrl-C reaches a process twice under torchrun, from the terminal and from torchrun."""


class Interruption:
    """Notes the first of SIGNALS for the loop to end after its step; a second one ends at once.

    Use it in a `with` block, in the main thread; the former handlers come back afterwards. The second one, more than a
    second after the first, ends the process also where the main thread waits in C code, in a collective for instance,
    and would never come to run a handler of Python. What is ignored stays so, as SIGHUP under `nohup`.
    """

    def __init__(self) -> None:
        self.signal: str | None = None
        """Name of the signal that was received, None as long as there was none."""
        self._former: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interruption:
        received, self._sent = os.pipe()
        os.set_blocking(self._sent, False)
        self._former_fd = signal.set_wakeup_fd(self._sent, warn_on_full_buffer=False)
        threading.Thread(target=_end_at_the_second, args=(received,), daemon=True).start()
        self._former = {number: signal.signal(number, self._note) for number in heeded()}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._former_fd)
        os.close(self._sent)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = self.signal or signal.Signals(number).name


def heeded() -> list[signal.Signals]:
    """Those of SIGNALS that whoever started this process has not told it to ignore."""
    return [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]


def _end_at_the_second(received: int) -> None:
    """Read the numbers of signals, which C code writes as they come, until the other end is closed."""
    first = None
    while numbers := os.read(received, 1):
        if numbers[0] in SIGNALS:
            now = time.monotonic()
            first = first or now
            if now - first > _SAME_S:
                os._exit(128 + numbers[0])  # as shells report a signal
    os.close(received)
