"""Lists of videos as people have them: text, tables and JSON lines, read to rows of a path and a label."""

from __future__ import annotations

import csv
import io
import json
import posixpath
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from applications.openvclip.data import storage

# fmt: off
VIDEO_SUFFIXES = frozenset((
    ".3g2", ".3gp", ".asf", ".avi", ".divx", ".dv", ".f4v", ".flv", ".gif", ".m2ts",
    ".m2v", ".m4v", ".mkv", ".mov", ".mp4", ".mpe", ".mpeg", ".mpg", ".mts", ".mxf",
    ".ogm", ".ogv", ".rm", ".rmvb", ".ts", ".vob", ".webm", ".wmv", ".y4m",
))
# fmt: on

_LINE = re.compile(
    rf"(?P<path>.*({'|'.join(re.escape(suffix) for suffix in sorted(VIDEO_SUFFIXES))}))([,;\t ]\s*(?P<label>.*))?", re.I
)


class Row(NamedTuple):
    """A video of a list."""

    path: str
    label: str | None
    """As it stands there: a class, a number, or nothing."""
    line: int
    """Number of its line, from 1."""


def is_number(label: str) -> bool:
    return label.isascii() and label.isdigit()


def in_order(labels: Iterable[str]) -> list[str]:
    """Labels once each: numbers by their value, names without regard to case, as UCF-101 counts its classes."""
    distinct = set(labels)
    return sorted(distinct, key=int) if all(map(is_number, distinct)) else sorted(distinct, key=str.casefold)


def read_rows(source: str, *, multi_label: bool = False) -> tuple[list[Row], str]:
    """The rows of a list, of those that say the same of the same video the first; and how it was understood.

    =================================== ================================================================
    JSON lines                          objects with `path` and `label`
    a table with a header               columns `path` and `label` among others; comma, semicolon or tab
    lines `path label` without a header mmaction2, SlowFast, VideoMAE, UCF-101, the Open-VCLIP release; the path
                                        ends in a video's suffix and may hold spaces and commas, what parts it
                                        from the label is a space, tab, comma or semicolon
    lines `path`                        UCF-101's test lists
    =================================== ================================================================

    Args:
        source: The list, a path or URL.
        multi_label: Whether a video may have several labels, a row for each.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A line can't be read in one way only, or a video has two labels and may not; the message names the
            line.
    """
    text = storage.read_text(source)
    if source.lower().endswith(".jsonl"):
        rows, understood = list(_json_lines(text, source)), "JSON lines of path and label"
    elif {"path", "label"} <= set(columns(text)):
        rows, understood = list(_table(text, source)), "table with columns path and label"
    else:
        rows, understood = list(_lines(text, source)), "lines of path and label"
    if not rows:
        raise ValueError(f"{source}: there is no video in it.")
    unlabelled = [row for row in rows if not row.label]
    if unlabelled and len(unlabelled) < len(rows):
        raise ValueError(f"{source}, line {unlabelled[0].line}: {unlabelled[0].path} has no label, others have one.")
    if len(unlabelled) == len(rows):
        understood = "lines of a path alone"
    distinct = _once(rows, source, multi_label=multi_label)
    if len(distinct) < len(rows):
        understood += f", {len(rows) - len(distinct)} of {len(rows)} rows repeat another and are left out"
    return distinct, understood


def columns(text: str) -> tuple[str, ...]:
    """The names of the columns if the text were a table: its first line, parted by comma, semicolon or tab."""
    first = next(iter(io.StringIO(text)), "").strip()
    return tuple(field.strip().strip('"').lower() for field in first.split(_separator(first)))


def _separator(line: str) -> str:
    return max(",;\t", key=line.count)


def _table(text: str, source: str) -> Iterator[Row]:
    header = columns(text)
    separator = _separator(text.partition("\n")[0])
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
    next(reader)
    path, label = header.index("path"), header.index("label")
    for fields in reader:
        if not any(field.strip() for field in fields):
            continue
        if len(fields) != len(header):
            raise ValueError(
                f"{source}, line {reader.line_num}: {len(fields)} fields, and {len(header)} columns: "
                f"{separator.join(fields)!r}. A field that holds {separator!r} needs quotation marks."
            )
        yield _checked(fields[path], fields[label].strip(), reader.line_num, source)


def _json_lines(text: str, source: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{source}, line {number}: no JSON: {error}") from None
        if not isinstance(row, dict) or not {"path", "label"} <= row.keys():
            raise ValueError(f"{source}, line {number}: an object with path and label is expected, got {line:.200}")
        if not isinstance(row["path"], str) or type(row["label"]) not in (str, int):
            raise ValueError(f"{source}, line {number}: path is text, label is text or a number, got {line:.200}")
        yield _checked(row["path"], str(row["label"]).strip(), number, source)


def _checked(path: str, label: str, number: int, source: str) -> Row:
    if not path or not label:
        raise ValueError(f"{source}, line {number}: {path or label!r} has no {'label' if path else 'path'}.")
    return Row(path, label, number)


def _lines(text: str, source: str) -> Iterator[Row]:
    for number, line in enumerate(io.StringIO(text), 1):
        line = line.strip()
        if not line:
            continue
        if line.startswith('"'):  # a path in quotation marks, as csv writes one that holds a comma
            path, end, rest = line[1:].replace('""', "\0").partition('"')
            line = (path + rest).replace("\0", '"') if end else line
        found = _LINE.fullmatch(line)
        if not found:
            raise ValueError(
                f"{source}, line {number}: {line[:200]!r} is not understood. Expected is a line `path label`, where "
                "the path ends in .mp4, .avi or another video's suffix, or a first line that names the columns path "
                "and label. Lists of folders of frames can't be read."
            )
        label = found["label"]
        if label is not None and re.fullmatch(r"-?\d+([,;\s]+-?\d+)+", label):
            raise ValueError(
                f"{source}, line {number}: after {found['path']} stand several numbers, {label!r}: the last may be the "
                "label and the others frames, as in mmaction2's lists of frames, or all may be labels. Leave one."
            )
        if label and len(label) > 1 and label[0] == label[-1] == '"':
            label = label[1:-1].replace('""', '"')
        elif label and (separator := line[len(found["path"])]) != " " and separator in label:
            raise ValueError(
                f"{source}, line {number}: after {found['path']} stand several fields, {label!r}. Leave the class "
                "alone, put it into quotation marks if all of it is the name, or name the columns in a first line."
            )
        yield Row(found["path"], label or None, number)


def _once(rows: list[Row], source: str, *, multi_label: bool) -> list[Row]:
    first: dict[tuple[str, str | None], Row] = {}
    for row in rows:
        path = row.path if storage.is_url(row.path) else posixpath.normpath(row.path)
        if multi_label:
            row = row._replace(path=path)  # or a video of several names would be several videos
        other = first.setdefault((path, row.label if multi_label else None), row)
        if other.label != row.label:
            raise ValueError(
                f"{source}: {row.path} is {other.label!r} in line {other.line} and {row.label!r} in line {row.line}; "
                "a video has one label, unless it is evaluated on by a protocol's file that says multi_label."
            )
    return list(first.values())
