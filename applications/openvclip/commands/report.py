"""What every evaluation leaves behind and shows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from rich.console import Console

from applications.openvclip import distributed
from applications.openvclip.runs.folder import RunFolder
from applications.openvclip.runs.lock import locked
from applications.openvclip.runs.provenance import provenance
from applications.openvclip.runs.texts import write_text
from applications.openvclip.zeroshot import tables
from applications.openvclip.zeroshot.plot import plot_tradeoff
from applications.openvclip.zeroshot.results import ProtocolResult, Results, write_results


@contextmanager
def alone_in(folder: RunFolder) -> Iterator[None]:
    """Keep the processes of other commands out of a folder, which is made if it is not there."""
    with ExitStack() as stack:
        former = distributed.on_first(lambda: stack.enter_context(locked(folder.path)))
        if former and distributed.rank() == 0:
            print(f"{folder.path}: taken over from {former}")
        yield


def report(folder: RunFolder, found: Sequence[ProtocolResult], settings: dict[str, Any]) -> None:
    """Write results.json, results.md and tradeoff.png, and print the table; one process does.

    Args:
        folder: Where to write.
        found: What was found, a protocol each.
        settings: What it was found with, as plain values.
    """
    if distributed.rank() > 0:
        return
    console = Console()
    weight = settings["evaluation"]["anchor_weight"]
    results = Results(settings["model"]["name"], weight, {r.protocol: r for r in found}, provenance(), settings)
    write_results(folder.results, results)
    write_text(folder.markdown, tables.markdown(results))
    if not found:
        console.print("nothing was evaluated: --data.test names data sets, --evaluation.protocols published protocols.")
        return
    console.print(tables.table(results))
    for result in found:
        if result.unreadable:
            policy = "counted as wrong" if result.unreadable_policy == "wrong" else "left out"
            console.print(f"{result.protocol}: {len(result.unreadable)} unreadable videos, {policy}")
        if result.cut_off:
            console.print(f"{result.protocol}: {len(result.cut_off)} videos are cut off, scored as far as they go")
    patched = all(f"{weight:g}" in result.accuracy for result in found)
    if patched and any(r.closed for r in found) and not all(r.closed for r in found):
        plot_tradeoff(folder.plot, results)
        console.print(f"the trade-off along the anchor weight: {folder.plot}", soft_wrap=True)
    else:
        console.print(
            "no plot of the trade-off: it needs fine-tuned weights, a set with the classes of training and one with "
            "others.",
            soft_wrap=True,
        )
    console.print(f"all figures: {folder.results}, as tables: {folder.markdown}", soft_wrap=True)
