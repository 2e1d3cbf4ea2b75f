"""Ranks that die, hang or fail: the others end, and say which one it was, in place of waiting for it for ever."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Literal

import torch.distributed as dist

from applications.openvclip import distributed

_BEAT_S = 1.0
_SILENT_BEATS = 5


@dataclass
class _Sign:
    """What a rank says of itself, with every beat."""

    beat: int
    state: Literal["running", "finished", "raised", "cut off"]
    """The last is the end of a rank that could not go on without others: an effect, not a cause."""
    step: int
    where: str
    error: str


class Watch:
    """Ends this process, with the name of the rank that is to blame, when a step takes longer than it may.

    Use it in a `with` block on every rank, around the loop; in a single process it does nothing. A thread leaves a
    sign of life each second in the store of torchrun, and reads those of the others, also while the main thread waits
    in a collective. Nothing is told by clocks: the seconds are beats of this thread, so that a process that was
    stopped for a while, or a clock that was set, does not look like a hanging rank. An error that leaves the block
    is told to the others; where it is that of a collective, it becomes one that names the rank that failed first.

    Args:
        limit_s: Seconds that one step may take, from the second on: the first may compile.

    Raises:
        ValueError: `limit_s` is not positive.
    """

    def __init__(self, limit_s: float) -> None:
        if not limit_s > 0:
            raise ValueError(f"the time limit of a step must be positive, got {limit_s} s.")
        self.limit_s = limit_s
        self._own = _Sign(0, "running", 0, "", "")
        self._others: dict[int, tuple[_Sign, int]] = {}
        """Last sign of each other rank, and how many beats ago it came."""
        self._beats_in_step = 0
        self._n_begun = 0
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Watch:
        if dist.is_initialized() and dist.get_world_size() > 1:
            self._main = threading.get_ident()
            self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        explained = error if error is None or not isinstance(error, Exception) else self.explained(error)
        if self._own.state == "running":
            self._own.state = "finished" if error is None else "raised"
            self._own.error = "" if error is None else f"{type(error).__name__}: {error}"
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        if explained is not error:
            assert explained is not None
            raise explained from error

    def step(self, n: int) -> None:
        """Say that step n begins."""
        self._own.step = n
        self._n_begun += 1
        self._beats_in_step = 0

    def explained(self, error: Exception) -> Exception:
        """The error itself; or where a collective failed, one that names the rank that ended or does not answer."""
        if self._thread is None or self._own.state == "cut off" or not _is_of_a_collective(error):
            return error
        self._own.state = "cut off"
        for _ in range(2 * _SILENT_BEATS):  # a rank that was killed is known by its silence
            if gone := self._gone():
                return RuntimeError(f"step {self._own.step}: {gone}.")
            time.sleep(_BEAT_S)
        return error

    def _run(self) -> None:
        """In the thread."""
        try:
            store = distributed.store("watch", timedelta(seconds=10))  # of this thread alone: others wait in theirs
            while True:
                self._beat(store)
                self._end_if_stuck(store)
                if self._ended.wait(_BEAT_S):
                    break
            self._leave_sign(store)  # the last one says how it ended
        except (dist.DistError, RuntimeError, OSError) as error:
            if not self._ended.is_set():  # torchrun was killed, and nobody would end or restart its processes
                reason = str(error).partition("\n")[0]
                print(
                    f"rank {dist.get_rank()}: torchrun does not answer ({reason}): ending.", file=sys.stderr, flush=True
                )
                os.kill(os.getpid(), signal.SIGTERM)
            while not self._ended.wait(_BEAT_S):
                self._beats_in_step += 1
                if self._beats_in_step * _BEAT_S > self.limit_s:
                    os._exit(1)

    def _beat(self, store: dist.Store) -> None:
        self._leave_sign(store)
        others = [rank for rank in range(dist.get_world_size()) if rank != dist.get_rank()]
        if len(self._others) < len(others):
            others = [rank for rank in others if store.check([str(rank)])]
        for rank, text in zip(others, store.multi_get([str(rank) for rank in others]), strict=True):
            sign = _Sign(**json.loads(text))
            former, age = self._others.get(rank, (sign, 0))
            self._others[rank] = sign, (0 if sign.beat != former.beat else age + 1)
        self._beats_in_step += 1

    def _leave_sign(self, store: dist.Store) -> None:
        self._own.beat += 1
        self._own.where = f"{_line(self._main)} on {socket.gethostname()}"
        store.set(str(dist.get_rank()), json.dumps(asdict(self._own)))

    def _end_if_stuck(self, store: dist.Store) -> None:
        """Where the main thread will not come back from a collective by itself."""
        limit_s = self.limit_s if self._n_begun > 1 else math.inf
        if any(sign.state == "raised" for sign, _ in self._others.values()):
            limit_s = min(limit_s, 2 * _SILENT_BEATS * _BEAT_S)
        if self._own.state != "running" or self._beats_in_step * _BEAT_S <= limit_s:
            return
        cause = self._gone() or self._behind() or f"every rank answers: {'; '.join(self._places())}"
        print(f"step {self._own.step} took longer than {limit_s:g} s: {cause}.", file=sys.stderr, flush=True)
        self._own.state = "cut off"
        self._leave_sign(store)
        sys.stdout.flush()
        os._exit(1)

    def _gone(self) -> str | None:
        """The others that take part in no collective any more."""
        signs = self._others.items()
        raised = [f"rank {rank} ended with {sign.error}" for rank, (sign, _) in signs if sign.state == "raised"]
        silent = [
            f"rank {rank} does not answer (last sign {age * _BEAT_S:.0f} s ago, in step {sign.step}, {sign.where})"
            for rank, (sign, age) in signs
            if sign.state == "running" and age >= _SILENT_BEATS
        ]
        finished = [f"rank {rank} had finished" for rank, (sign, _) in signs if sign.state == "finished"]
        return "; ".join(raised or silent or finished) or None

    def _behind(self) -> str | None:
        known = {dist.get_rank(), *self._others}
        never = [f"rank {rank} never answered" for rank in range(dist.get_world_size()) if rank not in known]
        behind = [
            f"rank {rank} is still in step {sign.step} ({sign.where})"
            for rank, (sign, _) in self._others.items()
            if sign.state == "running" and sign.step < self._own.step
        ]
        return "; ".join(never or behind) or None

    def _places(self) -> list[str]:
        signs = {dist.get_rank(): self._own} | {rank: sign for rank, (sign, _) in self._others.items()}
        return [f"rank {rank} in step {sign.step}, {sign.where}" for rank, sign in sorted(signs.items())]


def _is_of_a_collective(error: Exception) -> bool:
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError)
        and re.search("gloo|nccl|Connection closed|Timed out", str(error), re.I) is not None
    )


def _line(thread: int) -> str:
    """Where a thread is, outside of packages."""
    frames = traceback.extract_stack(sys._current_frames().get(thread))
    own = [frame for frame in frames if "site-packages" not in frame.filename] or frames
    return f"{Path(own[-1].filename).name}:{own[-1].lineno} in {own[-1].name}"
