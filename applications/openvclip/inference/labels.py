"""Label sets as people give them: names, several names a class, lists in files."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TypeVar

from applications.openvclip.data import storage

Labels = Sequence[str] | Mapping[str, Sequence[str]]
"""Classes by their names; or classes by what they are called here, each with the names by which the model knows it."""
LabelSet = tuple[tuple[str, tuple[str, ...]], ...]
"""The same, as a key: each class with its names."""
Names = TypeVar("Names", bound=Sequence[str])


def label_set(labels: Labels) -> LabelSet:
    """Labels in one form.

    Raises:
        ValueError: There is no label, one is empty or there twice, or a class has no name.

    Example:
        >>> label_set(["archery", "juggling balls"])
        (('archery', ('archery',)), ('juggling balls', ('juggling balls',)))
        >>> label_set({"sport": ["archery", "golf"]})
        (('sport', ('archery', 'golf')),)
    """
    if isinstance(labels, str):
        raise ValueError(f"labels are a list of names, got the text {labels!r}; for one label, give [{labels!r}].")
    pairs = labels.items() if isinstance(labels, Mapping) else [(name, (name,)) for name in labels]
    found = tuple((label, tuple(names)) for label, names in pairs)
    for label, names in found:
        if not label.strip() or not names or not all(name.strip() for name in names):
            raise ValueError(f"labels: every class needs a name, got {label!r} with the names {list(names)}.")
        if len(set(names)) < len(names):
            raise ValueError(f"labels: {label!r} has a name twice: {', '.join(names)}.")
    _distinct(found)
    return found


def read_labels(text: str) -> dict[str, list[str]]:
    """Labels as they are given in a command: `archery,juggling balls|juggling`, or a file.

    Commas part classes and `|` parts the names of one, of which the first is shown. A file has a class a line; or it is
    JSON, a list of names or an object from class to names.

    Raises:
        FileNotFoundError: The text ends as a file does, and there is none.
        ValueError: JSON that is neither.
    """
    if not text.lower().endswith((".txt", ".csv", ".json")) and not os.path.isfile(text):
        return classes_of(text.split(","))
    content = storage.read_text(text)
    if not text.lower().endswith(".json"):
        return classes_of(content.split("\n"))
    try:
        found = json.loads(content)
    except json.JSONDecodeError as error:
        raise ValueError(f"{text}: no JSON: {error}.") from None
    if isinstance(found, dict):
        found = {name: [names] if isinstance(names, str) else names for name, names in found.items()}
        lists = list(found.values())
    else:
        lists = [found]
    if not all(isinstance(names, list) and all(isinstance(name, str) for name in names) for names in lists):
        raise ValueError(f"{text}: a list of names is expected, or an object from class to names.")
    return found if isinstance(found, dict) else _distinct([(name, [name]) for name in found])


def classes_of(texts: Sequence[str]) -> dict[str, list[str]]:
    """Classes of texts `name|another name`; what is empty is left out."""
    names = [[name.strip() for name in text.split("|")] for text in texts if text.strip()]
    return _distinct([(several[0], several) for several in names])


def _distinct(classes: Sequence[tuple[str, Names]]) -> dict[str, Names]:
    if not classes:
        raise ValueError("labels: at least one is needed, got none.")
    counted = Counter(label for label, _ in classes)
    if twice := [label for label, n in counted.items() if n > 1]:
        raise ValueError(f"labels: {', '.join(map(repr, twice))}: there more than once.")
    return dict(classes)
