"""Names of classes as people write them: in folders, in sentences, and in files that name numbers."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import PurePosixPath

from applications.openvclip.data import storage
from applications.openvclip.data.lists import is_number
from applications.openvclip.data.manifest import Manifest

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


def read_names(source: str) -> dict[str, str]:
    """Names from a file: of classes, as they are or tidied, or of numbers.

    - JSON: an object from class or number to name, or from name to number (SlowFast's `classids.json`), or a list of
      names, counted from 0;
    - text: lines `number name` (UCF-101's `classInd.txt`; also with a comma, and under a header `id,name`), or lines
      `name` (mmaction2's `label_map`), counted from 0.

    Raises:
        ValueError: It is something else, or a number has two names.
    """
    text = storage.read_text(source)
    if PurePosixPath(source).suffix.lower() == ".json":
        return _from_json(text, source)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if lines and re.fullmatch(r"(id|index|number)[,;\t ]+(name|class|label)", lines[0], re.IGNORECASE):
        del lines[0]
    pairs = [re.fullmatch(r"(\d+)[,;\t ]+(.+)", line) for line in lines]
    if all(pairs):
        return _distinct([(pair[1], pair[2]) for pair in pairs if pair], source)
    if any(pairs):
        raise ValueError(
            f"{source}: some lines begin with a number, as {next(p[0] for p in pairs if p)!r}, others not."
        )
    return {str(i): line for i, line in enumerate(lines)}


def _from_json(text: str, source: str) -> dict[str, str]:
    try:
        names = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{source}: no JSON: {error}") from None
    if isinstance(names, list) and all(isinstance(name, str) for name in names):
        return {str(i): name for i, name in enumerate(names)}
    if isinstance(names, dict) and names and all(isinstance(value, str) for value in names.values()):
        return _distinct(list(names.items()), source)
    if isinstance(names, dict) and names and all(type(value) is int for value in names.values()):
        # the names in SlowFast's file are in quotation marks of their own
        return _distinct([(str(number), name.strip('"')) for name, number in names.items()], source)
    raise ValueError(f"{source}: an object from class or number to name is expected, or a list of names.")


def _distinct(pairs: list[tuple[str, str]], source: str) -> dict[str, str]:
    names: dict[str, str] = {}
    for key, name in pairs:
        key = str(int(key)) if is_number(key) else key
        if names.setdefault(key, name) != name:
            raise ValueError(f"{source}: {key} is {names[key]!r} and {name!r}.")
    return names


def beside(source: str) -> str | None:
    """The file that names the numbers of a list: beside it, or above it and fitting the name of its folder.

    Raises:
        ValueError: There are several.
    """
    folder = storage.parent(source)
    above, own = storage.parent(folder), PurePosixPath(folder).name
    found = [file for file in storage.list_names(folder) if file == "classInd.txt" or file.endswith("index2cls.json")]
    found = [storage.join(folder, file) for file in found]
    if not found:
        ending = "-index2cls.json"
        fitting = [file for file in storage.list_names(above) if file.endswith(ending)]
        fitting = [file for file in fitting if own.startswith(file.removesuffix(ending))]
        found = [storage.join(above, file) for file in fitting]
    if len(found) > 1:
        raise ValueError(f"{source}: its numbers may be named by any of {', '.join(found)}; say which: --names FILE.")
    return found[0] if found else None


def renamed(manifest: Manifest, names: Mapping[str, str]) -> Manifest:
    """The manifest with other class names; numbers count the classes in its order, from 0.

    Raises:
        ValueError: A class has no name there, or two have the same.
    """
    tidied = {tidy(key): value for key, value in names.items()}
    classes = [tidied.get(c) or names.get(c) or names.get(str(i)) for i, c in enumerate(manifest.classes)]
    unnamed = [c for c, new in zip(manifest.classes, classes, strict=True) if new is None]
    if unnamed:
        raise ValueError(f"{len(unnamed)} of {len(classes)} classes have no name in the file: {unnamed[0]!r}, ….")
    named = tuple(c for c in classes if c)
    if len(set(named)) < len(named):
        twice = next(c for c in named if named.count(c) > 1)
        raise ValueError(f"two classes get the same name, {twice!r}.")
    return replace(manifest, classes=named)
