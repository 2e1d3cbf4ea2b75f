"""Which classes an evaluation mixed up most, and videos of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from applications.openvclip.zeroshot.logits import LogitFiles
from applications.openvclip.zeroshot.protocols import Protocol


@dataclass(frozen=True)
class Confusion:
    """Videos of one class that were taken for another."""

    protocol: str
    shown: str
    """Their class."""
    taken_for: str
    videos: tuple[str, ...]
    """Where those are that were mixed up."""
    of: int
    """Videos of the class."""


def worst_confusions(folder: Path, protocols: Sequence[Protocol], scorer: str, n: int) -> list[Confusion]:
    """The n pairs of classes that were mixed up most in a run's latest evaluation, as a share of the class's videos.

    Args:
        folder: Where the logits are kept.
        protocols: What was evaluated on.
        scorer: Whose answers, such as "0.5", an anchor weight.
        n: How many, at most.
    """
    passes = sorted(folder.glob("*/pass.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    contents = [json.loads(path.read_text(encoding="utf-8")) for path in passes]
    found = []
    for protocol in protocols:
        if protocol.multi_label:
            continue  # another class that is shown as well is no confusion
        wanted = {part.location(i) for part in protocol.parts for i in range(len(part))}
        classes = {name for part in protocol.parts for name in part.classes}
        content = next(
            (c for c in contents if wanted <= {*c["videos"]} and classes <= {*c["classes"]} and scorer in c["scorers"]),
            None,
        )
        if content is not None:
            found += _confusions(LogitFiles(folder, content), protocol, content["scorers"].index(scorer))
    return sorted(found, key=lambda c: (-len(c.videos) / c.of, -len(c.videos)))[:n]


def _confusions(files: LogitFiles, protocol: Protocol, scorer: int) -> list[Confusion]:
    row = {location: i for i, location in enumerate(files.content["videos"])}
    column = {name: i for i, name in enumerate(files.content["classes"])}
    scores: dict[int, np.ndarray] = {}
    for indices, logits in files.chunks():
        scores |= zip(indices.tolist(), logits[:, scorer].sum(axis=1), strict=True)  # views are added
    mixed: dict[tuple[str, str], dict[str, None]] = {}
    shown: dict[str, set[str]] = {}
    for part in protocol.parts:
        columns = np.array([column[name] for name in part.classes])
        for i, label in enumerate(part.labels):
            video, name = part.location(i), part.classes[label]
            shown.setdefault(name, set()).add(video)
            if row[video] not in scores:
                continue
            answer = part.classes[int(scores[row[video]][columns].argmax())]
            if answer != name:
                mixed.setdefault((name, answer), {})[video] = None
    return [
        Confusion(protocol.name, name, answer, tuple(videos), len(shown[name]))
        for (name, answer), videos in mixed.items()
    ]
