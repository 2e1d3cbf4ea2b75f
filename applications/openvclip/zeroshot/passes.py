"""Which videos are looked at together: protocols that share some of them share a pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from applications.openvclip.data.sampling import Sampling
from applications.openvclip.zeroshot.protocols import Protocol


@dataclass(frozen=True)
class Pass:
    """Videos to look at once, for all protocols that share some of them, their sentences and their views."""

    videos: tuple[str, ...]
    """Locations, each once."""
    classes: tuple[str, ...]
    """Every class that competes in one of the protocols, each once."""
    templates: tuple[str, ...]
    sampling: Sampling


def plan(protocols: Sequence[Protocol]) -> dict[Pass, list[Protocol]]:
    """The passes that the protocols need, and which each is for: protocols that share a video share its pass."""
    groups: list[tuple[set[str], list[Protocol]]] = []
    for protocol in protocols:
        videos, together = set(_locations([protocol])), [protocol]
        apart = []
        for others, group in groups:
            alike = (group[0].templates, group[0].sampling) == (protocol.templates, protocol.sampling)
            if alike and videos & others:
                videos, together = videos | others, group + together
            else:
                apart.append((others, group))
        groups = [*apart, (videos, together)]
    passes = {}
    for _, group in groups:
        classes = dict.fromkeys(name for protocol in group for part in protocol.parts for name in part.classes)
        one = Pass(tuple(_locations(group)), tuple(classes), group[0].templates, group[0].sampling)
        passes[one] = group
    return passes


def _locations(protocols: Sequence[Protocol]) -> dict[str, None]:
    """The videos of protocols, each once, in order."""
    parts = [part for protocol in protocols for part in protocol.parts]
    return dict.fromkeys(part.location(i) for part in parts for i in range(len(part)))
