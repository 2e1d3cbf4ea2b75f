"""Figures out of logits: a protocol is a selection of rows and columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import torch

from applications.openvclip.zeroshot import metrics
from applications.openvclip.zeroshot.logits import LogitFiles
from applications.openvclip.zeroshot.passes import Pass
from applications.openvclip.zeroshot.protocols import Protocol
from applications.openvclip.zeroshot.results import ProtocolResult


def result_of(protocol: Protocol, one: Pass, files: LogitFiles) -> ProtocolResult:
    """The accuracies of a protocol: a selection of rows and columns of the logits of its pass.

    Raises:
        ValueError: No video of a part could be read, and unreadable ones are to be left out.
    """
    row = {location: i for i, location in enumerate(one.videos)}
    column = {name: i for i, name in enumerate(one.classes)}
    logits = torch.from_numpy(files.read()).sum(dim=2)  # (videos, scorers, classes): views are added
    reasons = files.unreadable()
    scorers: list[str] = files.content["scorers"]
    accuracy = {scorer: {f"top-{k}": [] for k in protocol.top_k} for scorer in scorers}
    answers: dict[str, list[tuple[torch.Tensor, list[str]]]] = {scorer: [] for scorer in scorers}
    videos: set[str] = set()
    for part in protocol.parts:
        locations = [part.location(i) for i in range(len(part))]
        videos.update(locations)
        kept = [i for i, at in enumerate(locations) if protocol.unreadable == "wrong" or row[at] not in reasons]
        if not kept:
            raise ValueError(f"{protocol.name}, {part.name}: none of its {len(part)} videos could be read.")
        rows = torch.tensor([row[locations[i]] for i in kept])
        columns = torch.tensor([column[name] for name in part.classes])
        labels = torch.tensor([part.labels[i] for i in kept])
        for s, scorer in enumerate(scorers):
            selected = logits[rows, s][:, columns]
            for k in protocol.top_k:
                accuracy[scorer][f"top-{k}"].append(metrics.top_k_accuracy(selected, labels, k))
            correct = metrics.top_k_correct(selected, labels)
            answers[scorer].append((correct, [part.classes[i] for i in labels.tolist()]))
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
        unreadable={at: reasons[row[at]] for at in sorted(videos) if row[at] in reasons},
        accuracy=accuracy,
        per_class={scorer: _per_class(found) for scorer, found in answers.items()},
    )


def _per_class(answers: Sequence[tuple[torch.Tensor, list[str]]]) -> dict[str, float]:
    correct = torch.cat([correct for correct, _ in answers])
    shown = [name for _, names in answers for name in names]
    classes = sorted(set(shown))
    index = {name: i for i, name in enumerate(classes)}
    labels = torch.tensor([index[name] for name in shown])
    return dict(zip(classes, metrics.per_class_accuracy(correct, labels, len(classes)).tolist(), strict=True))
