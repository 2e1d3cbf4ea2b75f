"""Data sets as they lie on disk: each layout is read where it is, and becomes a manifest."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Collection, Mapping
from pathlib import PurePosixPath

from applications.openvclip.data import storage
from applications.openvclip.data.manifest import Manifest, manifest_of, read_manifest

VIDEO_SUFFIXES = frozenset(
    (".3gp", ".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ogv", ".ts", ".webm", ".wmv")
)

_PUBLISHED_NAMES = {"YoYo": "Yoyo"}
"""Where the published class names don't follow the rule."""


def tidy(name: str) -> str:
    """A class name as one would write it in a sentence: words apart, nothing else changed.

    Example:
        >>> tidy("ApplyEyeMakeup"), tidy("brush_hair"), tidy("playing guitar")
        ('Apply Eye Makeup', 'brush hair', 'playing guitar')
        >>> tidy("TaiChi"), tidy("YoYo"), tidy("playing_TV_games")
        ('Tai Chi', 'Yoyo', 'playing TV games')
    """
    return _PUBLISHED_NAMES.get(name) or " ".join(re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name.replace("_", " ")).split())


def read_dataset(source: str, root: str | None = None, names: str | None = None, name: str | None = None) -> Manifest:
    """Read a data set in whichever of the known layouts it is.

    ======================================== =================================================================
    `source`                                 layout
    ======================================== =================================================================
    a folder of folders of videos            `class_folders`: UCF-101, HMDB-51, Kinetics' train/class name
    a folder of ``*_test_split1.txt``        `hmdb_lists`, its test videos; splits 2 and 3 by that function
    ``trainlist01.txt``, ``testlist01.txt``  `ucf_list`
    CSV with a column ``youtube_id``         `kinetics_csv`
    CSV of ``path,number`` without a header  `release_csv`: the lists of the Open-VCLIP release
    CSV or JSONL with ``path`` and ``label`` `applications.openvclip.data.manifest.read_manifest`
    ======================================== =================================================================

    Args:
        source: Folder or list, a path or URL.
        root: Where the videos are that a list names; by default the list's folder.
        names: A file of class names to use instead (`read_names`).
        name: Name of the set in results; by default that of the folder.

    Raises:
        FileNotFoundError: There is nothing there.
        ValueError: It is none of these, or something in it is wrong; the message says what.
    """
    if not storage.exists(source):
        raise FileNotFoundError(f"{source}: no such file or folder.")
    manifest = _read(source, root or storage.parent(source))
    if name:
        manifest = Manifest(name, manifest.root, manifest.paths, manifest.labels, manifest.classes)
    return renamed(manifest, read_names(names)) if names else manifest


def _read(source: str, root: str) -> Manifest:
    if PurePosixPath(source).suffix == ".jsonl":
        return read_manifest(source)
    if PurePosixPath(source).suffix == ".txt":
        return ucf_list(source, root)
    if PurePosixPath(source).suffix == ".csv":
        first = storage.read_text(source).partition("\n")[0].strip()
        if "youtube_id" in first:
            return kinetics_csv(source, root)
        if re.fullmatch(r".+,\d+", first):
            return release_csv(source, root)
        return read_manifest(source)
    if any(re.fullmatch(r".+_test_split1\.txt", file) for file in storage.list_files(source)):
        return hmdb_lists(source, root, split=1, kinds=(2,))
    return class_folders(source)


def class_folders(root: str) -> Manifest:
    """Videos in folders named after their classes, at any depth: `ApplyEyeMakeup/v_….avi`, `train/class name/….mp4`."""
    rows = []
    for path in storage.list_files(root):
        if PurePosixPath(path).suffix.lower() in VIDEO_SUFFIXES:
            folder = PurePosixPath(path).parent.name
            if not folder:
                raise ValueError(f"{root}: {path} lies in no folder that names its class.")
            rows.append((path, folder))
    return _tidied(root, root, rows)


def ucf_list(source: str, root: str) -> Manifest:
    """UCF-101's official lists: `ApplyEyeMakeup/v_….avi`, in training lists with the class's number after it.

    A `classInd.txt` beside the list says which numbers are right, and they are checked against the folders.
    """
    index = storage.join(storage.parent(source), "classInd.txt")
    numbers = {}
    if storage.exists(index):
        numbers = dict(line.split() for line in storage.read_text(index).splitlines() if line.strip())
    rows = []
    for line in storage.read_text(source).splitlines():
        path, _, number = line.strip().partition(" ")
        if not path:
            continue
        label = PurePosixPath(path).parent.name
        if not label:
            raise ValueError(f"{source}: {path!r} has no folder that names its class.")
        if number and numbers and numbers.get(number) != label:
            raise ValueError(f"{source}: {path} has the number {number}, which is {numbers.get(number)} in {index}.")
        rows.append((path, label))
    return _tidied(source, root, rows)


def hmdb_lists(folder: str, root: str, *, split: int, kinds: Collection[int]) -> Manifest:
    """HMDB-51's official lists, a file for each class: `brush_hair_test_split1.txt` of lines `video.avi 2`.

    Args:
        folder: Folder of the lists.
        root: Folder of the videos, which lie in folders of their classes.
        split: 1, 2 or 3.
        kinds: Which videos: 0 is unused in this split, 1 training, 2 test.
    """
    ending = f"_test_split{split}.txt"
    lists = [file for file in storage.list_files(folder) if file.endswith(ending)]
    if not lists:
        raise FileNotFoundError(f"{folder}: there is no list *{ending} in it.")
    rows = []
    for file in lists:
        label = PurePosixPath(file).name.removesuffix(ending)
        for line in storage.read_text(storage.join(folder, file)).splitlines():
            if line.strip():
                video, kind = line.split()
                if int(kind) in kinds:
                    rows.append((f"{label}/{video}", label))
    return _tidied(folder, root, rows)


def kinetics_csv(source: str, root: str) -> Manifest:
    """Kinetics' annotations: columns label, youtube_id, time_start, time_end and, in some, split.

    A video is found below `root` by its name, `id_000001_000011.mp4` or `id.mp4`. Those that are not there stay in the
    manifest, under the path where they would be, so that an evaluation counts them.
    """
    found = {}
    for path in storage.list_files(root):
        if PurePosixPath(path).suffix.lower() in VIDEO_SUFFIXES:
            found[PurePosixPath(path).stem] = path
    rows = []
    for row in csv.DictReader(io.StringIO(storage.read_text(source), newline="")):
        clip = f"{row['youtube_id']}_{float(row['time_start']):06.0f}_{float(row['time_end']):06.0f}"
        absent = f"{row['label']}/{clip}.mp4"
        rows.append((found.get(clip) or found.get(row["youtube_id"]) or absent, row["label"]))
    return _tidied(source, root, rows)


def release_csv(source: str, root: str, names: str | None = None) -> Manifest:
    """A list of the Open-VCLIP release: `path,number`, and an `…index2cls.json` that names the numbers.

    Args:
        source: The list.
        root: Folder of the videos.
        names: The names; by default the one `*index2cls.json` beside the list, or the one above it whose name the
            list's folder begins with (`hmdb_full/test.csv` and `hmdb-index2cls.json`).
    """
    names = names or _index2cls(source)
    classes = read_names(names)
    rows = []
    for line in storage.read_text(source).splitlines():
        path, _, number = line.rpartition(",")
        if line.strip():
            if number not in classes:
                raise ValueError(f"{source}: {path} has the number {number!r}, which is not in {names}.")
            rows.append((path, classes[number]))
    return manifest_of(_folder_name(source), root, rows, list(classes.values()), source)


def _index2cls(source: str) -> str:
    folder = storage.parent(source)
    beside = [file for file in storage.list_files(folder) if re.fullmatch(r"[^/]*index2cls\.json", file)]
    if len(beside) == 1:
        return storage.join(folder, beside[0])
    parent, own = storage.parent(folder), PurePosixPath(folder).name
    above = [file for file in storage.list_files(parent) if re.fullmatch(r"[^/]*-index2cls\.json", file)]
    fitting = [file for file in above if own.startswith(file.removesuffix("-index2cls.json"))]
    if len(fitting) != 1:
        raise FileNotFoundError(
            f"{source}: {len(fitting)} files *index2cls.json beside or above it fit its name; "
            "say which one names its classes."
        )
    return storage.join(parent, fitting[0])


def read_names(source: str) -> dict[str, str]:
    """Class names to use: a JSON object from a class, as it is or tidied, or from its number, to the name.

    Raises:
        ValueError: It is something else.
    """
    names = json.loads(storage.read_text(source))
    if not isinstance(names, dict) or not all(isinstance(value, str) for value in names.values()):
        raise ValueError(f"{source}: an object from class or number to name is expected.")
    return names


def renamed(manifest: Manifest, names: Mapping[str, str]) -> Manifest:
    """The manifest with other class names; numbers count the classes in its order, from 0.

    Raises:
        ValueError: A class has no name there.
    """
    tidied = {tidy(key): value for key, value in names.items()}
    classes = [tidied.get(c) or names.get(c) or names.get(str(i)) for i, c in enumerate(manifest.classes)]
    unnamed = [c for c, new in zip(manifest.classes, classes, strict=True) if new is None]
    if unnamed:
        raise ValueError(f"{len(unnamed)} of {len(classes)} classes have no name in the file: {unnamed[0]!r}, ….")
    return Manifest(manifest.name, manifest.root, manifest.paths, manifest.labels, tuple(c for c in classes if c))


def _tidied(source: str, root: str, rows: list[tuple[str, str]]) -> Manifest:
    raw = sorted({label for _, label in rows}, key=str.casefold)  # UCF-101 counts Hammering before HammerThrow
    classes = [tidy(label) for label in raw]
    if len(set(classes)) < len(raw):
        raise ValueError(f"{source}: two classes have the same name when tidied; there are {len(raw)}: {raw}.")
    return manifest_of(_folder_name(source), root, [(path, tidy(label)) for path, label in rows], classes, source)


def _folder_name(source: str) -> str:
    path = PurePosixPath(source)
    return path.parent.name if path.suffix else path.name
