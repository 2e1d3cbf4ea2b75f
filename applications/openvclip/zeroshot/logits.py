"""The logits of a pass over videos, in files that an interrupted pass goes on with."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from applications.openvclip.runs.files import write_text


@dataclass(frozen=True)
class LogitFiles:
    """Logits (videos, scorers, views, classes) of one pass, appended by any number of processes.

    Each process has a file of its own in the folder, of records of equal length: the index of a video, and its logits,
    all nan where the video could not be read. A record that a crash left incomplete is cut off. `pass.json` says what
    the rows and columns are; the folder is named after its hash, so that another pass is another folder.

    Args:
        folder: Where passes are kept.
        content: Everything that the logits depend on, as plain values: `videos`, `scorers`, `classes` (lists of names),
            `views` (their number), and whatever else tells one pass from another.
    """

    folder: Path
    content: dict[str, Any]

    @property
    def path(self) -> Path:
        """The folder of this pass."""
        key = hashlib.sha256(json.dumps(self.content, sort_keys=True).encode()).hexdigest()[:16]
        return self.folder / key

    @property
    def record(self) -> np.dtype:
        c = self.content
        shape = (len(c["scorers"]), c["views"], len(c["classes"]))
        return np.dtype([("video", "<i8"), ("logits", "<f4", shape)])

    def prepare(self) -> None:
        """Make the folder and say in it what the logits are."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_text(self.path / "pass.json", json.dumps(self.content, indent=1) + "\n")

    def append(self, process: int, videos: Sequence[int], logits: np.ndarray) -> None:
        """Add the logits (n, scorers, views, classes) of n videos to the file of a process."""
        records = np.empty(len(videos), self.record)
        records["video"] = videos
        records["logits"] = logits
        path = self._file(process)
        with path.open("ab") as file:
            complete = path.stat().st_size // self.record.itemsize * self.record.itemsize
            file.truncate(complete)
            file.write(records.tobytes())
            file.flush()
            os.fsync(file.fileno())

    def append_unreadable(self, process: int, video: int, reason: str) -> None:
        """Note that a video has no logits, and why."""
        with self._file(process).with_suffix(".unreadable.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"video": video, "reason": reason}) + "\n")
        self.append(process, [video], np.full((1, *self.record["logits"].shape), np.nan, np.float32))

    def done(self) -> set[int]:
        """The indices of the videos that are in the files."""
        return {int(i) for file in self._records() for i in file["video"]}

    def read(self) -> np.ndarray:
        """Logits (videos, scorers, views, classes) float32 of the whole pass.

        Raises:
            RuntimeError: A video is missing, or there twice.
        """
        n = len(self.content["videos"])
        seen = np.zeros(n, int)
        logits = np.empty((n, *self.record["logits"].shape), np.float32)
        for file in self._records():
            np.add.at(seen, file["video"], 1)
            logits[file["video"]] = file["logits"]
        if (seen != 1).any():
            raise RuntimeError(
                f"{self.path}: {(seen == 0).sum()} of {n} videos are missing, {(seen > 1).sum()} are there more than "
                "once; the pass has not ended, or two of them ran at the same time. Evaluate again to complete it, or "
                "delete the folder to begin anew."
            )
        return logits

    def unreadable(self) -> dict[int, str]:
        """Why videos have no logits, by index."""
        paths = sorted(self.path.glob("*.unreadable.jsonl"))
        lines = (line for path in paths for line in path.read_text(encoding="utf-8").splitlines())
        return {entry["video"]: entry["reason"] for entry in map(json.loads, lines)}

    def _file(self, process: int) -> Path:
        return self.path / f"{process:04d}.logits"

    def _records(self) -> list[np.ndarray]:
        records = []
        for path in sorted(self.path.glob("*.logits")):
            content = path.read_bytes()
            complete = len(content) // self.record.itemsize
            records.append(np.frombuffer(content, self.record, count=complete))
        return records
