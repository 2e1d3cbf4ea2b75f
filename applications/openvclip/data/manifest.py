"""A manifest: which videos there are, and what each shows."""

from __future__ import annotations

import csv
import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Manifest:
    """Videos and their classes; `labels[i]` is the index in `classes` of what `paths[i]` shows."""

    name: str
    paths: tuple[Path, ...]
    labels: tuple[int, ...]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.paths)


def read_manifest(path: Path, classes: Sequence[str] | None = None, name: str | None = None) -> Manifest:
    """Read a CSV file with the columns `path` and `label`, a label being a class name.

    Args:
        path: The file. Relative paths in it are relative to its folder.
        classes: The label set, in the order of the logits; by default the labels that occur, sorted.
        name: Name of the set in results; by default the name of the file's folder.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: A column is missing, there is no row, or a label is not one of `classes`; the message names the row.
    """
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if not {"path", "label"} <= set(reader.fieldnames or ()):
            raise ValueError(f"{path}: the first line must name the columns path and label, got {reader.fieldnames}.")
        rows = list(reader)
    if not rows:
        raise ValueError(f"{path}: there is no video in it.")
    classes = tuple(classes if classes is not None else sorted({row["label"] for row in rows}))
    index = {label: i for i, label in enumerate(classes)}
    for line, row in enumerate(rows, start=2):
        if row["label"] not in index:
            near = difflib.get_close_matches(row["label"], classes, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{path}, line {line}: {row['label']!r} is not one of the {len(classes)} classes.{hint}")
    return Manifest(
        name=name or path.parent.name,
        paths=tuple(path.parent / row["path"] for row in rows),
        labels=tuple(index[row["label"]] for row in rows),
        classes=classes,
    )
