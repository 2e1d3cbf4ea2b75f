"""How `predict` shows what it found: a table, JSON or CSV, on the standard output."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from applications.openvclip.inference.classifier import Classifier
from applications.openvclip.inference.many import Seen
from applications.openvclip.inference.windows import Segment, Timeline

Rows = Sequence[tuple[Seen, "dict[str, float] | None"]]
"""Videos, and the probability of each label, best first; None where they could not be read."""


def show(rows: Rows, classifier: Classifier, *, as_json: bool, as_csv: bool, top: int) -> None:
    """What videos show, each as a whole; in the table the `top` labels."""
    if as_json:
        videos: list[dict[str, Any]] = []
        for seen, found in rows:
            fault = {("cut_off" if found else "unreadable"): seen.fault} if seen.fault else {}
            videos.append({"video": seen.video} | ({"labels": found} if found else {}) | fault)
        model = {"model": classifier.loaded.model.name, "anchor_weight": classifier.anchor_weight}
        print(json.dumps({**model, "videos": videos}, indent=1, ensure_ascii=False))
    elif as_csv:
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(("video", "rank", "label", "probability", "fault"))
        for seen, found in rows:
            if found is None:
                writer.writerow((seen.video, "", "", "", seen.fault))
            for rank, (label, probability) in enumerate((found or {}).items(), 1):
                writer.writerow((seen.video, rank, label, f"{probability:.6f}", seen.fault))
    else:
        table = _table("video", "label", "%")
        for seen, found in rows:
            if found is None:
                table.add_row(Text(seen.video), Text(f"unreadable: {seen.fault}", style="red"))
                continue
            for i, (label, probability) in enumerate(list(found.items())[:top]):
                table.add_row(Text("" if i else seen.video), Text(label), f"{100 * probability:.1f}")
            if seen.fault:
                table.add_row("", Text(f"cut off, and used as far as it goes: {seen.fault}", style="yellow"))
        Console().print(table)


def show_along(
    timeline: Timeline,
    labels: Sequence[str],
    probabilities: np.ndarray,
    segments: Sequence[Segment],
    *,
    as_json: bool,
    as_csv: bool,
) -> None:
    """What a video shows along its time: the segments as a table, the windows as CSV, both as JSON."""
    ends = np.minimum(timeline.starts + timeline.window_s, timeline.length_s)
    windows = list(zip(timeline.starts.tolist(), ends.tolist(), probabilities.tolist(), strict=True))
    if as_json:
        scored = [{"start_s": a, "end_s": b, "labels": dict(zip(labels, row, strict=True))} for a, b, row in windows]
        content = {"video": timeline.video, "segments": [asdict(segment) for segment in segments], "windows": scored}
        cut_off = {"cut_off": timeline.shortfall} if timeline.shortfall else {}
        print(json.dumps(content | cut_off, indent=1, ensure_ascii=False))
    elif as_csv:
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(("start_s", "end_s", *labels))
        writer.writerows((f"{a:.3f}", f"{b:.3f}", *(f"{p:.6f}" for p in row)) for a, b, row in windows)
    else:
        table = _table("from", "to", "label", "%")
        for s in segments:
            table.add_row(f"{s.start_s:.1f} s", f"{s.end_s:.1f} s", Text(s.label), f"{100 * s.probability:.1f}")
        Console().print(table)


def _table(*columns: str) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold", justify="right" if column in ("from", "to", "%") else "left")
    return table
