"""The one way in which long work shows how far it is: a bar in a terminal, lines in a log."""

from __future__ import annotations

import time
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

_LINE_S = 30.0


def progress_bar(console: Console | None = None, unit: str = "videos") -> Progress:
    """What is done, of how much, how fast, since when, and the estimated time left.

    A task's field `details`, a text, is shown below its bar, or at the end of its lines.

    Args:
        console: Where to; by default the standard output.
        unit: What is counted.
    """
    console = console or Console()
    if not console.is_terminal:
        return _Lines(console, unit)
    return _Bars(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        _Speed(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
    )


class _Speed(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.3g}/s" if task.speed else "")


class _Bars(Progress):
    """Bars, each with its details below."""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks:
            if details := task.fields.get("details"):
                yield Text(details, style="dim", no_wrap=True, overflow="ellipsis")


class _Lines(Progress):
    """A line every half minute, and one at the end."""

    def __init__(self, console: Console, unit: str) -> None:
        super().__init__(console=console, disable=True)
        self.unit = unit
        self._last = time.monotonic()
        self._ended: set[TaskID] = set()

    def update(self, task_id: TaskID, **values: Any) -> None:
        super().update(task_id, **values)
        self._say(self._tasks[task_id])

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        super().advance(task_id, advance)
        self._say(self._tasks[task_id])

    def _say(self, task: Task) -> None:
        now = time.monotonic()
        if task.id in self._ended or (now - self._last < _LINE_S and not task.finished):
            return
        if task.finished:
            self._ended.add(task.id)
        self._last = now
        speed = f", {task.speed:.3g} {self.unit}/s" if task.speed else ""
        left = "" if task.time_remaining is None else f", {timedelta(seconds=int(task.time_remaining))} left"
        details = f"; {text}" if (text := task.fields.get("details")) else ""
        done, total = int(task.completed), int(task.total or 0)
        line = f"{task.description}: {done} of {total} {self.unit}{speed}{left}{details}"
        self.console.print(line, soft_wrap=True, highlight=False)
