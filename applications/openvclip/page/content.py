"""What a page shows beside its model: of a run, its trade-off, videos to try, and what it mixed up."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from applications.openvclip import build
from applications.openvclip.config import from_dict
from applications.openvclip.data.decode import VideoReadError
from applications.openvclip.data.workers import Workers
from applications.openvclip.inference.classifier import Classifier
from applications.openvclip.page import drawing
from applications.openvclip.page.confusions import Confusion, worst_confusions
from applications.openvclip.page.uploads import Looks
from applications.openvclip.zeroshot.protocols import Protocol
from applications.openvclip.zeroshot.results import read_results

_EXAMPLES = 3
_RIVALS = 4
"""Labels for each example, its own among them."""
_CONFUSIONS = 6
_CLIPS = 3
"""Of each pair of classes that were mixed up."""


@dataclass(frozen=True)
class Content:
    """What is about the model on its page."""

    about: str
    """Which model it is, as plain text."""
    labels: str
    """To begin with, parted by commas."""
    examples: Mapping[str, Path]
    """Videos of this machine, by what they show."""
    tradeoff: drawing.Tradeoff | None
    confusions: str
    """As HTML; empty where there are none."""


def content_of(
    classifier: Classifier,
    pool: Workers[str, Looks],
    source: str | None,
    labels: Mapping[str, Sequence[str]] | None,
) -> Content:
    """What there is to show of a model.

    Args:
        classifier: The model.
        pool: Reads the videos that were mixed up.
        source: Where it is from.
        labels: To begin with; by default those of some of its videos.
    """
    loaded = classifier.loaded
    trained: list[str] = json.loads(loaded.metadata.get("classes", "[]"))
    protocols: list[Protocol] = []
    tradeoff, mixed_up = None, ""
    if loaded.folder and loaded.folder.results.exists():
        results = read_results(loaded.folder.results)
        if {r.closed for r in results.protocols.values()} == {True, False}:
            tradeoff = drawing.Tradeoff(results)
        try:
            protocols = build.protocols(from_dict(loaded.folder.read_settings()), trained)
        except (OSError, ValueError):  # what it was evaluated on is not on this machine; the model is
            protocols = []
        found = worst_confusions(loaded.folder.logits, protocols, f"{results.anchor_weight:g}", _CONFUSIONS)
        mixed_up = drawing.confusions(found, _clips(found, pool)) if found else ""
    examples = _examples(protocols)
    texts = (
        ["|".join(several) for several in labels.values()] if labels else _rivals(examples, protocols) or trained[:8]
    )
    fine_tuned = f"fine-tuned in {Path(source or '').name}" if loaded.theta else "pretrained only"
    return Content(
        about=f"{loaded.model.name}, {fine_tuned}" + (f", {len(trained)} classes learnt" if trained else ""),
        labels=", ".join(texts),
        examples=examples,
        tradeoff=tradeoff,
        confusions=mixed_up,
    )


def _examples(protocols: Sequence[Protocol]) -> dict[str, Path]:
    """A video of each of some protocols, if it is a file here."""
    found = {}
    for part in (protocol.parts[0] for protocol in protocols):
        i = len(part) // 3
        if Path(part.location(i)).is_file():
            found[part.classes[part.labels[i]]] = Path(part.location(i))
    return dict(list(found.items())[:_EXAMPLES])


def _rivals(examples: Mapping[str, Path], protocols: Sequence[Protocol]) -> list[str]:
    """The classes of the examples, each with those that are most like it in words: an easy choice shows nothing."""
    classes = list(dict.fromkeys(name for protocol in protocols for part in protocol.parts for name in part.classes))
    near = [difflib.get_close_matches(name, classes, n=_RIVALS, cutoff=0) for name in examples]
    return list(dict.fromkeys(name for names in near for name in names))


def _clips(found: Sequence[Confusion], pool: Workers[str, Looks]) -> dict[str, bytes]:
    """Moving pictures of what was mixed up, as far as it can be read."""
    videos = [video for confusion in found for video in confusion.videos[:_CLIPS]]
    return {
        video: drawing.animation(looks.views[0])
        for video, looks in zip(videos, pool.map(videos), strict=True)
        if not isinstance(looks, VideoReadError)
    }
