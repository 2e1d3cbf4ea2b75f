"""What is seen of training while it runs: progress, the journal, TensorBoard, curves."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch

from applications.openvclip.progress import progress_bar
from applications.openvclip.runs.folder import RunFolder
from applications.openvclip.runs.journal import Journal

try:
    import resource
except ImportError:  # Windows does not tell how much memory a process has had
    resource = None

_DRAWN_EVERY_S = 30.0
_DRAWING_SHARE = 0.05
"""Of the time, at most, is a picture being drawn, however long the journal has become."""
_DRAWING_LIMIT_S = 120.0
_WINDOW = 50
"""Steps over which the share of time waiting for data is shown."""

_left_to_draw: list[subprocess.Popen[bytes]] = []
"""Pictures of trainings that have failed, drawn by themselves."""


class Monitor:
    """Shows and records the steps of a run; one process does.

    Every value of a step goes into the journal and, if it is asked for, to TensorBoard; `curves.png` is drawn from the
    journal every half minute and at the end, by a process of its own at the lowest priority.

    Args:
        journal: Where events are written; None for steps that leave nothing behind, neither journal nor curves.
        folder: Of the run.
        total_steps: Of the whole run, not of what is left of it.
        clips_per_step: Of all processes together.
        tensorboard: Whether to write events for TensorBoard too.

    Raises:
        ModuleNotFoundError: There is no TensorBoard to write for; the message has the command that installs it.
    """

    def __init__(
        self, journal: Journal | None, folder: RunFolder, total_steps: int, clips_per_step: int, tensorboard: bool
    ) -> None:
        if tensorboard and find_spec("tensorboard") is None:
            raise ModuleNotFoundError(
                "TensorBoard was asked for and is not installed: pip install tensorboard. The journal has the same "
                "figures without it."
            )
        self.journal = journal
        self.folder = folder
        self._clips_per_step = clips_per_step
        self._tensorboard = tensorboard
        self._writer: Any = None
        self._progress = progress_bar(unit="clips")
        self._task = self._progress.add_task("fine-tuning", total=total_steps * clips_per_step)
        self._shown: dict[str, float] = {}
        self._times: deque[tuple[float, float]] = deque(maxlen=_WINDOW)
        self._drawing: subprocess.Popen[bytes] | None = None
        self._drawn_steps = self._steps = 0

    def __enter__(self) -> Monitor:
        self._progress.start()
        self._last = self._began_drawing = time.monotonic()
        self._next_drawing = self._last + _DRAWN_EVERY_S
        return self

    def step(self, step: int, values: dict[str, float], waited_s: float) -> None:
        """Tell of a step that has been taken.

        Args:
            step: Its number; the first of a run is 1.
            values: What it was like: loss, learning_rate and so on.
            waited_s: Seconds that it waited for its data.
        """
        now = time.monotonic()
        duration, self._last = max(now - self._last, 1e-9), now
        self._times.append((duration, waited_s))
        machine = {"clips_per_s": self._clips_per_step / duration, "waiting": min(1.0, waited_s / duration)}
        if memory := peak_memory_gb():
            machine["memory_gb"] = memory
        self._steps += 1
        self._shown |= values  # what is measured now and then is shown until it is measured again
        self._progress.update(self._task, completed=step * self._clips_per_step, details=self._details(memory))
        self._record("step", step, values | {"machine": machine})
        if self.journal and now > self._next_drawing:
            self._finish_drawing(wait=False)
            if self._drawing is None:
                self._draw()

    def event(self, name: str, **values: Any) -> None:
        """Tell of something else; when this returns it is on the disk, and so is all that was told before."""
        self._record(name, values.pop("step", None), values)
        if self.journal:
            self.journal.sync()
        if self._writer:
            self._writer.flush()

    def say(self, text: str) -> None:
        """Print a line, above the bar."""
        self._progress.console.print(text, soft_wrap=True, highlight=False)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Something else than training happens, with a progress of its own: its time is not that of a step."""
        self._progress.stop()
        try:
            yield
        finally:
            self._progress.start()
            self._last = time.monotonic()

    def __exit__(self, kind: type | None, *error: object) -> None:
        self._progress.stop()
        if self._writer:
            self._writer.close()
        told_first = kind is not None  # what went wrong; torchrun may leave no time for the picture
        self._finish_drawing(wait=not told_first)
        if self.journal and self._steps > self._drawn_steps and self._drawing is None:
            self._draw()
        if told_first and self._drawing:
            _left_to_draw.append(self._drawing)
        else:
            self._finish_drawing(wait=True)

    def _details(self, memory: float | None) -> str:
        """The values that one wants to see pass by, in a line."""
        shown = self._shown
        losses = [f"{shown[name]:.3f}" for name in ("loss", "interpolated_loss") if name in shown]
        texts = [f"loss {' and '.join(losses)}"] if losses else []
        texts += [f"{shown[name]:.3g} from the anchor" for name in ("distance",) if name in shown]
        texts += [f"learning rate {shown[name]:.2g}" for name in ("learning_rate",) if name in shown]
        duration, waited = (sum(parts) for parts in zip(*self._times, strict=True))
        texts += [f"{min(1.0, waited / duration):.0%} waiting for data"]
        return ", ".join([*texts, *([f"{memory:.1f} GB at most"] if memory else [])])

    def _record(self, event: str, step: int | None, values: dict[str, Any]) -> None:
        at = {} if step is None else {"step": step}
        if self.journal:
            self.journal.write(event, **at, **values)
        if self._tensorboard and step is not None:
            if self._writer is None:
                from torch.utils.tensorboard import SummaryWriter

                self._writer = SummaryWriter(self.folder.tensorboard, purge_step=step)  # of a run that was cut
            for name, value in _numbers(event, values):
                self._writer.add_scalar(name, value, step)

    def _draw(self) -> None:
        assert self.journal is not None
        self._began_drawing, self._drawn_steps = time.monotonic(), self._steps
        command = [sys.executable, "-m", "applications.openvclip.training.curves"]
        self._drawing = subprocess.Popen(  # noqa: S603 # a module of ours
            [*command, self.journal.path, self.folder.curves],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for the training
        )

    def _finish_drawing(self, wait: bool) -> None:
        """See whether the picture is drawn; say so if it could not be, and go on without it."""
        if self._drawing is None or (not wait and self._drawing.poll() is None):
            return
        try:
            said = self._drawing.communicate(timeout=_DRAWING_LIMIT_S)[1].decode(errors="replace").strip()
        except subprocess.TimeoutExpired:
            self._drawing.kill()
            self._drawing.communicate()
            said = f"it took longer than {_DRAWING_LIMIT_S:g} s"
        if self._drawing.returncode:
            self.say(f"{self.folder.curves} could not be drawn: {said.splitlines()[-1] if said else 'it was killed'}")
        self._drawing = None
        now = time.monotonic()
        self._next_drawing = now + max(_DRAWN_EVERY_S, (now - self._began_drawing) / _DRAWING_SHARE)


def peak_memory_gb() -> float | None:
    """The most memory that this process has held, in GB: tensors on the GPU, or all of it on the CPU; None: unknown."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    if resource is None:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def _numbers(name: str, value: Any) -> Iterator[tuple[str, float]]:
    """The numbers in nested values, each under its path: "evaluation/accuracy/ucf101/0.5"."""
    if isinstance(value, dict):
        for key, leaf in value.items():
            yield from _numbers(f"{name}/{key}", leaf)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield name, value
