"""How a file was made: the recipe in its metadata, and the inputs as they are seen from it."""

from __future__ import annotations

import json
import os

from interpolate._operations import Recipe, is_recipe
from interpolate.checkpoints import Checkpoint
from interpolate.errors import CheckpointError

Path = str | os.PathLike[str]

RECIPE = "interpolate"
"""The key of the recipe in a file's metadata."""


def recipe_of(checkpoint: Checkpoint) -> Recipe | None:
    """The recipe in a checkpoint's metadata, None if there is none."""
    text = checkpoint.metadata.get(RECIPE)
    if text is None:
        return None
    try:
        recipe = json.loads(text)
    except (ValueError, RecursionError):
        recipe = None
    if not is_recipe(recipe):
        raise CheckpointError(f"{checkpoint.path} holds a recipe that is none: {text!r:.200}.")
    return recipe


def _is_url(path: str) -> bool:
    return "://" in path


def folder_of(path: Path, is_output_folder: bool = False) -> str:
    """The folder that a checkpoint is in, without links; nothing for a URL."""
    path = os.fspath(path)
    if _is_url(path):
        return ""
    return os.path.realpath(path if is_output_folder else os.path.dirname(path))


def seen_from(folder: str, path: str) -> str:
    """A path relative to a folder, so that both can be moved together; absolute where the folder is a URL."""
    if _is_url(path):
        return path
    path = os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
    return os.path.relpath(path, folder) if folder else path
