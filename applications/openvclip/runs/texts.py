"""Texts on the disk, and JSON that is named when it is none. Nothing heavy is imported to read them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    from interpolate.atomic import replacing  # brings torch, which reading can do without

    with replacing(path) as file:
        file.write(text.encode())


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table in Markdown."""
    return [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]


def json_object(text: str, source: object) -> dict[str, Any]:
    """The object in a JSON text.

    Raises:
        ValueError: It is no JSON, or no object; the message names the source and the place.
    """
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{source}: not JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{source}: a JSON object was expected, {{…}}, and it is a {type(content).__name__}.")
    return content
