"""Figures out of logits: a protocol is a selection of rows and columns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import chain
from math import isnan, nan
from statistics import fmean

import numpy as np
import torch
from torch import Tensor

from applications.openvclip.data.manifest import Manifest
from applications.openvclip.zeroshot.confidence import (
    accuracy_at_coverage,
    auroc,
    average_precision,
    calibration_error,
    with_and_without,
)
from applications.openvclip.zeroshot.logits import LogitFiles
from applications.openvclip.zeroshot.passes import Pass
from applications.openvclip.zeroshot.protocols import Protocol
from applications.openvclip.zeroshot.results import ProtocolResult


def results_of(
    protocols: Sequence[Protocol], one: Pass, files: LogitFiles, temperatures: Mapping[str, float] | None = None
) -> list[ProtocolResult]:
    """The figures of the protocols of a pass: each is a selection of rows and columns of its logits.

    The logits are read once, a part at a time.

    Raises:
        ValueError: No video of a part could be read, and unreadable ones are to be left out.
    """
    row = {location: i for i, location in enumerate(one.videos)}
    unreadable, cut_off = files.faults("unreadable"), files.faults("cut-off")
    scorers: list[str] = files.content["scorers"]
    known = [(temperatures or {}).get(scorer, nan) for scorer in scorers]
    parts = [
        [
            _RankedPart(part, one, row, len(scorers)) if p.multi_label else _Part(part, one, row, p.top_k, known)
            for part in p.parts
        ]
        for p in protocols
    ]
    for videos, logits in files.chunks():
        scores = torch.from_numpy(logits).sum(dim=2)  # (videos, scorers, classes): views are added
        for part in chain.from_iterable(parts):
            part.add(videos, scores, logits.shape[2])
    return [_result(p, own, scorers, row, unreadable, cut_off) for p, own in zip(protocols, parts, strict=True)]


def _result(
    protocol: Protocol,
    parts: Sequence[_Part | _RankedPart],
    scorers: list[str],
    row: dict[str, int],
    unreadable: dict[int, str],
    cut_off: dict[int, str],
) -> ProtocolResult:
    figures: dict[str, list[dict[str, float]]] = {scorer: [] for scorer in scorers}
    answers: dict[str, list[dict[str, tuple[float, int]]]] = {scorer: [] for scorer in scorers}
    for part in parts:
        counted = torch.tensor([protocol.unreadable == "wrong" or i not in unreadable for i in part.rows.tolist()])
        if not counted.any():
            name, n = part.manifest.name, len(part.manifest)
            raise ValueError(f"{protocol.name}, {name}: none of its {n} videos could be read.")
        for s, scorer in enumerate(scorers):
            figures[scorer].append(part.accuracy(s, counted))
            answers[scorer].append(part.per_class(s, counted))
    videos = {part.location(i) for part in protocol.parts for i in range(len(part))}
    return ProtocolResult(
        protocol=protocol.name,
        hash=protocol.hash,
        closed=protocol.closed,
        videos=len(videos),
        classes=len({name for part in protocol.parts for name in part.classes}),
        parts=[part.name for part in protocol.parts],
        top_k=list(protocol.top_k),
        templates=list(protocol.templates),
        sampling=asdict(protocol.sampling),
        unreadable_policy=protocol.unreadable,
        unreadable={at: unreadable[row[at]] for at in sorted(videos) if row[at] in unreadable},
        cut_off={at: cut_off[row[at]] for at in sorted(videos) if row[at] in cut_off},
        accuracy={scorer: _by_name(found) for scorer, found in figures.items()},
        confidence={scorer: _by_name([part.sureness(s) for part in parts]) for s, scorer in enumerate(scorers)},
        per_class={scorer: _per_class(found) for scorer, found in answers.items()},
        multi_label=protocol.multi_label,
    )


def among(rows: Tensor, videos: np.ndarray) -> tuple[Tensor, Tensor]:
    """Which of the rows of a pass are among these videos of it: their indices, and their places in `videos`."""
    order = videos.argsort()
    places = order[np.searchsorted(videos, rows.numpy(), sorter=order).clip(max=len(videos) - 1)]
    here = np.flatnonzero(videos[places] == rows.numpy())
    return torch.from_numpy(here), torch.from_numpy(places[here])


class _Part:
    """Which rows of a part are right, by scorer: all that is kept of the logits. Rows without logits are wrong."""

    def __init__(
        self, part: Manifest, one: Pass, row: dict[str, int], top_k: Sequence[int], temperatures: Sequence[float]
    ) -> None:
        self.manifest = part
        self.rows = torch.tensor([row[part.location(i)] for i in range(len(part))])
        """The row of the pass that each row of the part is."""
        self.labels = torch.tensor(part.labels)
        column = {name: i for i, name in enumerate(one.classes)}
        self.columns = torch.tensor([column[name] for name in part.classes])
        n_scorers = len(temperatures)
        self.correct = {k: torch.zeros(n_scorers, len(part), dtype=torch.bool) for k in {1, *top_k}}
        self.top_k = top_k
        self._temperatures = torch.tensor(temperatures)
        self._sure = torch.full((4, n_scorers, len(part)), nan)
        """Of each row: its confidence, the calibrated one, and its highest logit with and without its class."""

    def add(self, videos: np.ndarray, scores: Tensor, views: int) -> None:
        """Take in the scores (n, scorers, classes) of n videos of the pass, sums over views."""
        here, places = among(self.rows, videos)
        selected = scores[places][:, :, self.columns]
        for k, correct in self.correct.items():
            for s in range(scores.shape[1]):
                correct[s, here] = top_k_correct(selected[:, s], self.labels[here], k)
        logits = selected.transpose(0, 1) / views
        self._sure[0, :, here] = logits.softmax(dim=-1).amax(dim=-1)
        self._sure[1, :, here] = (logits / self._temperatures.view(-1, 1, 1)).softmax(dim=-1).amax(dim=-1)
        if len(self.columns) > 1:
            self._sure[2, :, here], self._sure[3, :, here] = with_and_without(logits, self.labels[here])

    def accuracy(self, scorer: int, counted: Tensor) -> dict[str, float]:
        """By metric, over the rows that count."""
        return {f"top-{k}": self.correct[k][scorer, counted].double().mean().item() for k in self.top_k}

    def per_class(self, scorer: int, counted: Tensor) -> dict[str, tuple[float, int]]:
        """How many rows of each class are right, and how many there are."""
        correct, labels = self.correct[1][scorer, counted], self.labels[counted]
        return {
            self.manifest.classes[label]: (float(correct[labels == label].sum()), n)
            for label, n in Counter(labels.tolist()).items()
        }

    def sureness(self, scorer: int) -> dict[str, float]:
        """How sure the answers are, over the rows that have logits."""
        there = ~self._sure[0, scorer].isnan()
        if not there.any():
            return {}
        plain, calibrated, inside, outside = self._sure[:, scorer, there].double().numpy()
        correct = self.correct[1][scorer, there].numpy()
        found = {"ece": calibration_error(plain, correct), "accuracy_at_95": accuracy_at_coverage(plain, correct)}
        if not isnan(self._temperatures[scorer]):
            found["ece_calibrated"] = calibration_error(calibrated, correct)
        if len(self.columns) > 1:
            found["auroc"] = auroc(inside, outside)
        return found


class _RankedPart:
    """The scores of a part whose videos may have several labels. A video without logits comes last for every class."""

    def __init__(self, part: Manifest, one: Pass, row: dict[str, int], n_scorers: int) -> None:
        self.manifest = part
        rows = torch.tensor([row[part.location(i)] for i in range(len(part))])
        self.rows, of = rows.unique(return_inverse=True)
        """The row of the pass that each video of the part is."""
        column = {name: i for i, name in enumerate(one.classes)}
        self.columns = torch.tensor([column[name] for name in part.classes])
        self.shown = torch.zeros(len(self.rows), len(part.classes), dtype=torch.bool)
        self.shown[of, torch.tensor(part.labels)] = True
        self.scores = torch.full((n_scorers, len(self.rows), len(part.classes)), -torch.inf)

    def add(self, videos: np.ndarray, scores: Tensor, views: int) -> None:
        """Take in the scores (n, scorers, classes) of n videos of the pass, sums over views."""
        here, places = among(self.rows, videos)
        self.scores[:, here] = scores[places][:, :, self.columns].transpose(0, 1)

    def accuracy(self, scorer: int, counted: Tensor) -> dict[str, float]:
        """The mean average precision of the classes that a video shows."""
        values = self.per_class(scorer, counted).values()
        return {"mAP": fmean(value for value, _ in values)}

    def per_class(self, scorer: int, counted: Tensor) -> dict[str, tuple[float, int]]:
        """The average precision of each class that a video shows, once."""
        shown, scores = self.shown[counted], self.scores[scorer, counted]
        return {
            name: (average_precision(scores[:, c].numpy(), shown[:, c].numpy()), 1)
            for c, name in enumerate(self.manifest.classes)
            if shown[:, c].any()
        }

    def sureness(self, scorer: int) -> dict[str, float]:
        """Nothing: there is no one answer to be sure of."""
        return {}


def _by_name(parts: Sequence[dict[str, float]]) -> dict[str, list[float]]:
    """Figures of parts by name, of those that all parts have."""
    return {name: [part[name] for part in parts] for name in parts[0] if all(name in part for part in parts)}


def _per_class(parts: Sequence[dict[str, tuple[float, int]]]) -> dict[str, float]:
    """The mean of each class that is shown, over all parts: sums and counts of each part."""
    names = sorted({name for part in parts for name in part})
    found = {name: [part[name] for part in parts if name in part] for name in names}
    return {name: sum(value for value, _ in own) / sum(n for _, n in own) for name, own in found.items()}


def top_k_correct(logits: Tensor, labels: Tensor, k: int = 1) -> Tensor:
    """Whether each video's class is among its k highest logits: (videos, classes) and (videos,) → (videos,) bool."""
    return (logits.topk(k, dim=1).indices == labels.unsqueeze(1)).any(dim=1)
