"""A manifest: which videos there are, and what each shows."""

from __future__ import annotations

import csv
import difflib
import io
import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from applications.openvclip.data import storage


@dataclass(frozen=True)
class Manifest:
    """Videos and their classes; `labels[i]` is the index in `classes` of what `paths[i]` shows."""

    name: str
    root: str
    """Folder or URL that the paths are relative to."""
    paths: tuple[str, ...]
    labels: tuple[int, ...]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def location(self, i: int) -> str:
        """Path or URL of a video."""
        return storage.join(self.root, self.paths[i])

    def of_classes(self, classes: Collection[str], name: str) -> Manifest:
        """The videos of some of the classes, which alone are the label set; both stay in their order."""
        kept = [i for i, c in enumerate(self.classes) if c in classes]
        index = {old: new for new, old in enumerate(kept)}
        rows = [(path, index[label]) for path, label in zip(self.paths, self.labels, strict=True) if label in index]
        return replace(
            self,
            name=name,
            paths=tuple(path for path, _ in rows),
            labels=tuple(label for _, label in rows),
            classes=tuple(self.classes[i] for i in kept),
        )

    def only(self, indices: Iterable[int]) -> Manifest:
        """Some of the videos; the label set stays what it is."""
        kept = sorted(indices)
        paths, labels = (tuple(values[i] for i in kept) for values in (self.paths, self.labels))
        return replace(self, paths=paths, labels=labels)


def manifest_of(
    name: str, root: str, rows: Sequence[tuple[str, str]], classes: Sequence[str] | None = None, source: str = ""
) -> Manifest:
    """A manifest of rows (path, class).

    Args:
        name: Name of the set in results.
        root: Folder or URL that the paths are relative to.
        rows: Path and class of each video.
        classes: The label set, in the order of the logits; by default the classes that occur, sorted.
        source: Where the rows were read, for messages.

    Raises:
        ValueError: There is no row, or a class is not one of `classes`; the message names the row.
    """
    if not rows:
        raise ValueError(f"{source or root}: there is no video in it.")
    classes = tuple(classes if classes is not None else sorted({label for _, label in rows}))
    index = {label: i for i, label in enumerate(classes)}
    for path, label in rows:
        if label not in index:
            near = difflib.get_close_matches(label, classes, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{source}: {path}: {label!r} is not one of the {len(classes)} classes.{hint}")
    return Manifest(name, root, tuple(path for path, _ in rows), tuple(index[label] for _, label in rows), classes)


def read_manifest(source: str | Path, classes: Sequence[str] | None = None, name: str | None = None) -> Manifest:
    """Read a CSV file with the columns `path` and `label`, or a JSONL file of such objects; labels are class names.

    Args:
        source: The file, a path or URL. Relative paths in it are relative to its folder.
        classes: The label set, in the order of the logits; by default the labels that occur, sorted.
        name: Name of the set in results; by default the name of the file's folder.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: A column is missing, there is no row, or a label is not one of `classes`; the message names the row.
    """
    source = str(source)
    text = storage.read_text(source)
    if source.endswith(".jsonl"):
        rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        columns = set.intersection(*map(set, rows)) if rows else {"path", "label"}
    else:
        reader = csv.DictReader(io.StringIO(text, newline=""))
        columns, rows = reader.fieldnames or (), list(reader)
    if not {"path", "label"} <= set(columns):
        raise ValueError(f"{source}: every row needs the columns path and label, got {sorted(columns)}.")
    folder = storage.parent(source)
    videos = [(row["path"], row["label"]) for row in rows]
    return manifest_of(name or Path(folder).resolve().name, folder, videos, classes, source)


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Write a CSV file that `read_manifest` reads, with whole paths."""
    path.parent.mkdir(parents=True, exist_ok=True)
    root = manifest.root if storage.is_url(manifest.root) else str(Path(manifest.root).resolve())
    whole = replace(manifest, root=root)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("path", "label"))
        writer.writerows((whole.location(i), manifest.classes[label]) for i, label in enumerate(manifest.labels))
