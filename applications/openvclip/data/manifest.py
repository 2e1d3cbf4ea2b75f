"""A manifest: which videos there are, and what each shows."""

from __future__ import annotations

import csv
import difflib
import hashlib
import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from applications.openvclip.data import lists, storage


@dataclass(frozen=True)
class Manifest:
    """Videos and their classes; `labels[i]` is the index in `classes` of what `paths[i]` shows."""

    name: str
    root: str
    """Folder or URL that the paths are relative to."""
    paths: tuple[str, ...]
    labels: tuple[int, ...]
    classes: tuple[str, ...]
    reading: str = field(default="", compare=False)
    """How its source was understood, for people."""

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def hash(self) -> str:
        """16 hexadecimal digits of the videos in their order and their classes, wherever they are stored."""
        content = json.dumps([self.paths, self.labels, self.classes])
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def location(self, i: int) -> str:
        """Path or URL of a video."""
        return storage.join(self.root, self.paths[i])

    def lines(self) -> list[str]:
        """How the source was understood and its first rows, as lines of text: a wrong reading shows here."""
        rows = [f"  {path}: {self.classes[label]}" for path, label in zip(self.paths[:3], self.labels[:3], strict=True)]
        names = ", ".join(self.classes[:5]) + (", …" if len(self.classes) > 5 else "")
        return [f"read as: {self.reading}", f"classes: {names}", *rows]

    def of_classes(self, classes: Collection[str], name: str) -> Manifest:
        """The videos of some of the classes, which alone are the label set; both stay in their order.

        Classes that have no video here come last.
        """
        wanted = set(classes)
        without = sorted(wanted - set(self.classes))
        kept = [i for i, c in enumerate(self.classes) if c in wanted]
        index = {old: new for new, old in enumerate(kept)}
        rows = [(path, index[label]) for path, label in zip(self.paths, self.labels, strict=True) if label in index]
        return replace(
            self,
            name=name,
            paths=tuple(path for path, _ in rows),
            labels=tuple(label for _, label in rows),
            classes=(*(self.classes[i] for i in kept), *without),
        )

    def only(self, indices: Iterable[int]) -> Manifest:
        """Some of the videos; the label set stays what it is."""
        kept = sorted(indices)
        paths, labels = (tuple(values[i] for i in kept) for values in (self.paths, self.labels))
        return replace(self, paths=paths, labels=labels)


def manifest_of(
    name: str,
    root: str,
    rows: Sequence[tuple[str, str]],
    classes: Sequence[str] | None = None,
    source: str = "",
    reading: str = "",
) -> Manifest:
    """A manifest of rows (path, class).

    Args:
        name: Name of the set in results.
        root: Folder or URL that the paths are relative to.
        rows: Path and class of each video.
        classes: The label set, in the order of the logits; by default the classes that occur, sorted.
        source: Where the rows were read, for messages.
        reading: How they were understood.

    Raises:
        ValueError: There is no row, a class is not one of `classes`, or two of these have the same name; the message
            names the row.
    """
    if not rows:
        raise ValueError(f"{source or root}: there is no video in it.")
    classes = tuple(classes if classes is not None else lists.in_order(label for _, label in rows))
    index = {label: i for i, label in enumerate(classes)}
    if len(index) < len(classes):
        twice = next(label for i, label in enumerate(classes) if index[label] != i)
        raise ValueError(f"{source or root}: two classes have the same name, {twice!r}.")
    for path, label in rows:
        if label not in index:
            near = difflib.get_close_matches(label, classes, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{source}: {path}: {label!r} is not one of the {len(classes)} classes.{hint}")
    paths, labels = tuple(path for path, _ in rows), tuple(index[label] for _, label in rows)
    return Manifest(name, root, paths, labels, classes, reading)


def read_manifest(source: str | Path, classes: Sequence[str] | None = None, name: str | None = None) -> Manifest:
    """Read a list of paths and class names (`applications.openvclip.data.lists.read_rows`), names as they stand there.

    Args:
        source: The file, a path or URL. Relative paths in it are relative to its folder.
        classes: The label set, in the order of the logits; by default the labels that occur, sorted.
        name: Name of the set in results; by default the name of the file's folder.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: A row can't be read, there is none, or a label is not one of `classes`; the message names the row.
    """
    source = str(source)
    rows, reading = lists.read_rows(source)
    folder = storage.parent(source)
    videos = [(row.path, row.label or "") for row in rows]
    return manifest_of(name or Path(folder).resolve().name, folder, videos, classes, source, reading)


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Write a CSV file that `read_manifest` reads, with whole paths."""
    path.parent.mkdir(parents=True, exist_ok=True)
    root = manifest.root if storage.is_url(manifest.root) else str(Path(manifest.root).resolve())
    whole = replace(manifest, root=root)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("path", "label"))
        writer.writerows((whole.location(i), manifest.classes[label]) for i, label in enumerate(manifest.labels))
