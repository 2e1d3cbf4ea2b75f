"""Prompt templates: the sentences that a class name is put into."""

from __future__ import annotations

ACTION_TEMPLATES = tuple(
    f"a {medium} of {action}."
    for medium in ("photo", "video", "example", "demonstration")
    for action in (
        "{}",
        "a person {}",
        "a person using {}",
        "a person doing {}",
        "a person during {}",
        "a person performing {}",
        "a person practicing {}",
    )
)
"""The 28 templates of the published run, "a example" among them."""

OBJECT_TEMPLATES = ("a {}", "a photo of a {}", "a picture of a {}", "an image of a {}")
"""For the things of the miniature world."""

TEMPLATES = {"actions": ACTION_TEMPLATES, "objects": OBJECT_TEMPLATES}
