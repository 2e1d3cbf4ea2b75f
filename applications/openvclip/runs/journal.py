"""The journal of a run: one JSON line an event."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Journal:
    """Appends events to a file; what was written before a crash stays readable."""

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


def read_journal(path: Path) -> list[dict[str, Any]]:
    """The events of a journal; a last line that a crash left incomplete is left out."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]
