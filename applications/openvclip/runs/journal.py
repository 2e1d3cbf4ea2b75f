"""The journal of a run: one JSON line an event."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from applications.openvclip.runs.texts import json_object, write_text


@dataclass(frozen=True)
class Journal:
    """Appends events to a file; what was written before a crash stays readable.

    What happens at a step carries its number, as `step`. What comes of the clock and the machine stands apart, in
    `time` and in `machine`, so that all the rest is the same however often a run is stopped (`cut`).
    """

    path: Path

    def write(self, event: str, **values: Any) -> None:
        """Append one line: `{"event": event, "time": …, **values}`, in place of one that a crash left incomplete."""
        time = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        line = json.dumps({"event": event, "time": time, **values}) + "\n"
        with self.path.open("ab+") as file:
            if end := file.seek(0, os.SEEK_END):
                file.seek(end - 1)
                if file.read(1) != b"\n":
                    file.seek(0)
                    file.truncate(file.read().rfind(b"\n") + 1)
            file.write(line.encode())

    def sync(self) -> None:
        """Have all that was written on the disk, so that it outlives the machine and not only the process."""
        with self.path.open("ab") as file:
            os.fsync(file.fileno())

    def cut(self, step: int) -> None:
        """Take out what happened after a step: a run goes on from its checkpoint of that step, and it happens again.

        The journal of a run that was killed and resumed, however often, is then line by line that of a run never
        stopped, but for the lines `start`, which tell of processes and all stay, for those of checkpoints where these
        are made by the clock, and for the values `time` and `machine`. It takes that a step is written before the
        checkpoint that holds it, and that what is told once a run is not told again by the next process.

        The new journal takes the place of the old one in one step, or not at all.
        """
        if not self.path.exists():
            return
        lines = _whole_lines(self.path)
        kept = [
            line
            for line, event in zip(lines, _events(lines, self.path), strict=True)
            if event.get("event") == "start" or event.get("step", 0) <= step
        ]
        if len(kept) < len(lines):
            write_text(self.path, "".join(kept))


def read_journal(path: Path) -> list[dict[str, Any]]:
    """The events of a journal; a last line that a crash left incomplete is left out.

    Raises:
        ValueError: A line is no JSON object; the message has its number.
    """
    return _events(_whole_lines(path), path)


def _whole_lines(path: Path) -> list[str]:
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [line for line in lines if line.endswith("\n")]


def _events(lines: list[str], path: Path) -> list[dict[str, Any]]:
    return [json_object(line, f"{path}, line {i}") for i, line in enumerate(lines, start=1)]
