"""Complete runs by name."""

from __future__ import annotations

from applications.openvclip.config import Config


def miniature() -> Config:
    """The whole method on the built-in small world of videos, on a laptop's processor.

    python -m applications.openvclip.train miniature
    """
    return Config(recipe="miniature")


RECIPES = {recipe.__name__: recipe for recipe in (miniature,)}
