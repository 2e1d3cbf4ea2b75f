"""The logits of a pass over videos, in files that an interrupted pass goes on with."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from applications.openvclip.runs.journal import Journal, read_journal
from applications.openvclip.runs.texts import write_text

Fault = Literal["unreadable", "cut-off"]
"""What may be wrong with a video; one that was cut off is used as far as it goes."""

_CHUNK_BYTES = 1 << 25


class LogitFiles:
    """Logits (videos, scorers, views, classes) of one pass, appended by any number of processes.

    Each process has a file of its own in the folder, of records of equal length: the index of a video, and its logits.
    A record that a crash left incomplete is cut off. What is wrong with videos is in journals beside the records; one
    that could not be read has no record, so that the pass tries it again when it goes on. `pass.json` says what the
    rows and columns are; the folder is named after its hash, so that another pass is another folder.

    Args:
        folder: Where passes are kept.
        content: Everything that the logits depend on, as plain values: `videos`, `scorers`, `classes` (lists of names),
            `views` (their number), and whatever else tells one pass from another.
    """

    def __init__(self, folder: Path, content: dict[str, Any]) -> None:
        self.folder = folder
        self.content = content

    @cached_property
    def path(self) -> Path:
        """The folder of this pass."""
        key = hashlib.sha256(json.dumps(self.content, sort_keys=True).encode()).hexdigest()[:16]
        return self.folder / key

    @cached_property
    def record(self) -> np.dtype:
        c = self.content
        shape = (len(c["scorers"]), c["views"], len(c["classes"]))
        return np.dtype([("video", "<i8"), ("logits", "<f4", shape)])

    def prepare(self) -> None:
        """Make the folder and say in it what the logits are; what could not be read is to be tried again."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_text(self.path / "pass.json", json.dumps(self.content, indent=1) + "\n")
        for path in self._journals("unreadable"):
            path.unlink()

    def append(self, process: int, videos: Sequence[int], logits: np.ndarray) -> None:
        """Add the logits (n, scorers, views, classes) of n videos to the file of a process."""
        records = np.empty(len(videos), self.record)
        records["video"] = videos
        records["logits"] = logits
        path = self.path / f"{process:04d}.logits"
        with path.open("ab") as file:
            complete = path.stat().st_size // self.record.itemsize * self.record.itemsize
            file.truncate(complete)
            file.write(records.tobytes())
            file.flush()
            os.fsync(file.fileno())

    def append_fault(self, process: int, fault: Fault, video: int, reason: str) -> None:
        """Note what is wrong with a video; that it was cut off, before its logits, so that no crash comes between."""
        Journal(self.path / f"{process:04d}.{fault}.jsonl").write(fault, video=video, reason=reason)

    def done(self) -> set[int]:
        """The indices of the videos that have logits."""
        return {int(i) for records in self._records() for i in records["video"]}

    def count(self) -> int:
        """How many videos have logits or a reason by now, without reading them."""
        records = sum(path.stat().st_size // self.record.itemsize for path in self.path.glob("*.logits"))
        return records + sum(path.read_bytes().count(b"\n") for path in self._journals("unreadable"))

    def chunks(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The logits of the whole pass, a part at a time: indices of videos (n,), logits (n, scorers, views, classes).

        Videos that could not be read have none. Memory is that of one part, whatever the pass.

        Raises:
            RuntimeError: A video has neither logits nor a reason, or has them twice.
        """
        seen = np.zeros(len(self.content["videos"]), np.int64)
        seen[list(self.faults("unreadable"))] = 1
        for records in self._records():
            np.add.at(seen, records["video"], 1)
        if (seen != 1).any():
            raise RuntimeError(
                f"{self.path}: {(seen == 0).sum()} of {len(seen)} videos are missing, {(seen > 1).sum()} are there "
                "more than once; the pass has not ended, or two of them ran at the same time. Evaluate again to "
                "complete it, or delete the folder to begin anew."
            )
        rows = max(1, _CHUNK_BYTES // self.record.itemsize)
        for records in self._records():
            for first in range(0, len(records), rows):
                part = np.array(records[first : first + rows])
                yield part["video"], part["logits"]

    def faults(self, fault: Fault) -> dict[int, str]:
        """Why videos have no logits, or what is missing of those that were cut off, by index."""
        return {e["video"]: e["reason"] for path in self._journals(fault) for e in read_journal(path)}

    def _journals(self, fault: Fault) -> list[Path]:
        return sorted(self.path.glob(f"*.{fault}.jsonl"))

    def _records(self) -> Iterator[np.ndarray]:
        for path in sorted(self.path.glob("*.logits")):
            complete = path.stat().st_size // self.record.itemsize
            if complete:
                yield np.memmap(path, self.record, mode="r", shape=(complete,))
