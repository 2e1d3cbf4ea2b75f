"""Label sets as people give them: names, several names a class, lists in files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

Labels = Sequence[str] | Mapping[str, Sequence[str]]
"""Classes by their names; or classes by what they are called here, each with the names by which the model knows it."""
LabelSet = tuple[tuple[str, tuple[str, ...]], ...]
"""The same, as a key: each class with its names."""


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
    if not found:
        raise ValueError("labels: at least one is needed, got none.")
    for label, names in found:
        if not label.strip() or not names or not all(name.strip() for name in names):
            raise ValueError(f"labels: every class needs a name, got {label!r} with the names {list(names)}.")
        if len(set(names)) < len(names):
            raise ValueError(f"labels: {label!r} has a name twice: {', '.join(names)}.")
    twice = [label for i, (label, _) in enumerate(found) if label in [other for other, _ in found[:i]]]
    if twice:
        raise ValueError(f"labels: {', '.join(map(repr, dict.fromkeys(twice)))}: there more than once.")
    return found
