"""Data sets as they lie on disk: each layout is read where it is, and becomes a manifest."""

from __future__ import annotations

import csv
import io
import os
import re
from collections import defaultdict
from collections.abc import Collection
from dataclasses import replace
from pathlib import PurePosixPath

from applications.openvclip.data import class_names, lists, storage
from applications.openvclip.data.class_names import tidy
from applications.openvclip.data.lists import VIDEO_SUFFIXES, Row
from applications.openvclip.data.manifest import Manifest, manifest_of

_SETS = frozenset(("train", "training", "val", "valid", "validation", "test", "testing"))
"""Folders of these names part a data set into sets and are no classes."""


def read_dataset(
    source: str,
    root: str | None = None,
    names: str | None = None,
    name: str | None = None,
    *,
    multi_label: bool = False,
) -> Manifest:
    """Read a data set in whichever of the known layouts it is; `Manifest.reading` says which.

    ======================================== =================================================================
    `source`                                 layout
    ======================================== =================================================================
    a folder of folders of videos            `class_folders`: UCF-101, HMDB-51, Kinetics' train/class name
    a folder of ``*_test_split1.txt``        `hmdb_lists`, its test videos; splits 2 and 3 by that function
    a table with a column ``youtube_id``     `kinetics_csv`
    any other list                           `read_list`: UCF-101, mmaction2, SlowFast, VideoMAE, the Open-VCLIP
                                             release, tables with the columns ``path`` and ``label``, JSON lines
    ======================================== =================================================================

    Args:
        source: Folder or list, a path or URL.
        root: Where the videos are that a list names; by default the list's folder.
        names: A file of class names to use instead (`applications.openvclip.data.class_names.read_names`).
        name: Name of the set in results; by default that of the folder.
        multi_label: Whether a video may have several labels, a row of the list for each.

    Raises:
        FileNotFoundError: There is nothing there.
        ValueError: It is none of these, something in it is wrong, or it can be read in two ways; the message says what.
    """
    if not storage.exists(source):
        raise FileNotFoundError(f"{source}: no such file or folder.")
    manifest = _read(source, root or storage.parent(source), names, multi_label=multi_label)
    return replace(manifest, name=name) if name else manifest


def _read(source: str, root: str, names: str | None, *, multi_label: bool) -> Manifest:
    if not storage.is_folder(source):
        if PurePosixPath(source).suffix.lower() in VIDEO_SUFFIXES:
            raise ValueError(f"{source} is a video; a folder of class folders or a list of videos is expected.")
        if "youtube_id" not in lists.columns(storage.read_text(source)):
            return read_list(source, root, names, multi_label=multi_label)
        manifest = kinetics_csv(source, root)
    elif any(re.fullmatch(r".+_test_split1\.txt", file) for file in storage.list_files(source)):
        manifest = hmdb_lists(source, root, split=1, kinds=(2,))
    else:
        manifest = class_folders(source)
    return class_names.renamed(manifest, class_names.read_names(names)) if names else manifest


def class_folders(root: str) -> Manifest:
    """Videos in folders named after their classes: `ApplyEyeMakeup/v_….avi`, `train/class name/….mp4`.

    Raises:
        ValueError: A video lies in no folder, or in several, any of which could be its class.
    """
    rows, above, others = [], set(), []
    for path in storage.list_files(root):
        if PurePosixPath(path).suffix.lower() not in VIDEO_SUFFIXES:
            others.append(path)
        else:
            *outer, _ = path.split("/")
            if not outer:
                raise ValueError(
                    f"{root}: {path} lies in no folder that names its class. Put the videos of each class into a "
                    "folder of its name, or give a list: CSV of the columns path,label."
                )
            above.add("/".join(outer[:-1]))
            rows.append((path, outer[-1]))
    if len(above) > 1 and not all(PurePosixPath(folder).name.lower() in _SETS for folder in above):
        path = next(path for path, _ in rows if path.count("/") > 1)
        outer, folder, _ = path.split("/")[-3:]
        raise ValueError(
            f"{root}: {path} may be of class {folder!r}, its own folder, or of {outer!r}, the one above. "
            "Give the folder that holds the class folders and nothing else, or a list of path and class."
        )
    understood = "folders named after their classes"
    if len(above) > 1:
        understood += f", of the sets {', '.join(sorted(above))} together"
    if others:
        understood += f", without {len(others)} files that are no videos by their suffix, as {others[0]}"
    return _tidied(root, root, rows, understood)


def read_list(source: str, root: str, names: str | None = None, *, multi_label: bool = False) -> Manifest:
    """A list of videos, as `applications.openvclip.data.lists.read_rows` reads it. What a label is, in this order:

    - a name: the class;
    - nothing: the class is the folder's name, as in UCF-101's test lists;
    - a number that `names`, the file beside the list (`classInd.txt`, `*index2cls.json`) or the one above it whose name
      the list's folder begins with (`hmdb_full/test.csv` and `hmdb-index2cls.json`) gives a name;
    - a number where every number has one folder and every folder one number: the folder's name.

    All other lists of numbers are refused: a class without a name can't be put into a sentence.

    Args:
        source: The list.
        root: Folder of the videos.
        names: File of names for the numbers, or of names to use instead of the classes.
        multi_label: Whether a video may have several labels, a row for each.

    Raises:
        ValueError: As above, or a number has no name; the message names the line.
    """
    rows, understood = lists.read_rows(source, multi_label=multi_label)
    numbers = [row for row in rows if row.label and lists.is_number(row.label)]
    given = class_names.read_names(names) if names else {}
    if not numbers:
        if any(row.label for row in rows):
            manifest = _tidied(source, root, [(row.path, row.label or "") for row in rows], understood)
        else:
            videos = [(row.path, _folder_of(row, source)) for row in rows]
            manifest = _tidied(source, root, videos, f"{understood}, classes are the names of their folders")
    elif len(numbers) < len(rows):
        other = next(row for row in rows if not lists.is_number(row.label or ""))
        raise ValueError(
            f"{source}: the label in line {numbers[0].line} is a number, {numbers[0].label}, "
            f"and in line {other.line} a name, {other.label!r}."
        )
    elif given and all(map(lists.is_number, given)):
        return _numbered(source, root, rows, names or "", given, understood)
    elif beside := class_names.beside(source):
        manifest = _numbered(source, root, rows, beside, class_names.read_names(beside), understood)
    else:
        manifest = _numbered(source, root, rows, "", _folders_of_numbers(rows, source), understood)
    return class_names.renamed(manifest, given) if given else manifest


def _folder(path: str) -> str:
    return path.rpartition("/")[0].rpartition("/")[2]  # PurePosixPath would take most of the time for a long list


def _folder_of(row: Row, source: str) -> str:
    folder = _folder(row.path)
    if not folder:
        raise ValueError(f"{source}, line {row.line}: {row.path!r} has no label and no folder that names its class.")
    return folder


def _folders_of_numbers(rows: list[Row], source: str) -> dict[str, str]:
    folders, numbers = defaultdict(set), defaultdict(set)
    for row in rows:
        folder = _folder(row.path)
        folders[int(row.label or 0)].add(folder)
        numbers[folder].add(row.label)
    one_to_one = all(len(values) == 1 for values in (*folders.values(), *numbers.values()))
    if not one_to_one or len(folders) < 2 or "" in numbers:
        raise ValueError(
            f"{source}: labels are numbers ({len(folders)}, as {rows[0].label} of {rows[0].path}) and have no names. "
            f"The classes may be the numbers, or the folders ({len(numbers)}, as {next(iter(numbers))!r}); the two do "
            "not go together. Name the numbers: --names FILE, or a classInd.txt or *index2cls.json beside the list."
        )
    return {str(number): tidy(folder) for number in sorted(folders) for folder in folders[number]}


def _numbered(
    source: str, root: str, rows: list[Row], names_source: str, names: dict[str, str], understood: str
) -> Manifest:
    official = PurePosixPath(names_source).name == "classInd.txt"
    videos = []
    for row in rows:
        number = str(int(row.label or 0))
        if number not in names:
            raise ValueError(f"{source}: {row.path} has the number {row.label!r}, which is not in {names_source}.")
        folder = _folder(row.path)
        if official and folder and tidy(folder) != tidy(names[number]):
            raise ValueError(
                f"{source}: {row.path} has the number {number}, which is {names[number]} in {names_source}."
            )
        videos.append((row.path, tidy(names[number]) if official else names[number]))
    classes = [tidy(names[number]) if official else names[number] for number in sorted(names, key=int)]
    understood = f"{understood}, a number, which {names_source or 'the folder'} names"
    return manifest_of(_folder_name(source), root, videos, classes, source, understood)


def hmdb_lists(folder: str, root: str, *, split: int, kinds: Collection[int]) -> Manifest:
    """HMDB-51's official lists, a file for each class: `brush_hair_test_split1.txt` of lines `video.avi 2`.

    Args:
        folder: Folder of the lists.
        root: Folder of the videos, which lie in folders of their classes.
        split: 1, 2 or 3.
        kinds: Which videos: 0 is unused in this split, 1 training, 2 test.
    """
    ending = f"_test_split{split}.txt"
    files = [file for file in storage.list_files(folder) if file.endswith(ending)]
    if not files:
        raise FileNotFoundError(f"{folder}: there is no list *{ending} in it.")
    rows = []
    for file in files:
        label = PurePosixPath(file).name.removesuffix(ending)
        for line in storage.read_text(storage.join(folder, file)).split("\n"):
            if line.strip():
                video, _, kind = line.strip().rpartition(" ")
                if kind not in ("0", "1", "2") or not video:
                    raise ValueError(f"{folder}/{file}: {line!r} is no line `video 0`, `video 1` or `video 2`.")
                if int(kind) in kinds:
                    rows.append((f"{label}/{video.strip()}", label))
    return _tidied(folder, root, rows, f"HMDB-51's official lists, split {split}, kinds {sorted(kinds)}")


def kinetics_csv(source: str, root: str) -> Manifest:
    """Kinetics' annotations: columns label, youtube_id, time_start, time_end and, in some, split.

    A video is found below `root` by its name, `id_000001_000011.mp4` or `id.mp4`. Those that are not there stay in the
    manifest, under the path where they would be, so that an evaluation counts them.
    """
    found = {}
    for path in storage.list_files(root):
        if PurePosixPath(path).suffix.lower() in VIDEO_SUFFIXES:
            found[PurePosixPath(path).stem] = path
    rows, absent = [], 0
    for number, row in enumerate(csv.DictReader(io.StringIO(storage.read_text(source), newline="")), 2):
        try:
            clip = f"{row['youtube_id']}_{float(row['time_start']):06.0f}_{float(row['time_end']):06.0f}"
            label = row["label"].strip()
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"{source}, line {number}: label, youtube_id, time_start and time_end are expected, got {row}."
            ) from error
        path = found.get(clip) or found.get(row["youtube_id"])
        absent += path is None
        rows.append((path or f"{label}/{clip}.mp4", label))
    return _tidied(source, root, rows, f"Kinetics' annotations, {absent} of their {len(rows)} videos not in {root}")


def _tidied(source: str, root: str, rows: list[tuple[str, str]], understood: str) -> Manifest:
    raw = lists.in_order(label for _, label in rows)  # UCF-101 counts Hammering before HammerThrow
    classes = {label: tidy(label) for label in raw}
    if len(set(classes.values())) < len(raw):
        raise ValueError(f"{source}: two classes have the same name when tidied; there are {len(raw)}: {raw}.")
    videos = [(path, classes[label]) for path, label in rows]
    return manifest_of(_folder_name(source), root, videos, list(classes.values()), source, understood)


def _folder_name(source: str) -> str:
    path = PurePosixPath(source if storage.is_url(source) else os.path.abspath(source))  # "." has a name, too
    return path.parent.name if path.suffix else path.name
