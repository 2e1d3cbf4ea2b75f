"""What the README quotes of the miniature: its table and its plot, both made from the one results.json that is shipped.

python benchmarks/quoted.py runs/miniature-…    # ship the results of a run, and quote them
python benchmarks/quoted.py                     # quote anew what is shipped
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

from applications.openvclip.zeroshot.plot import plot_tradeoff
from applications.openvclip.zeroshot.results import BASELINE, ProtocolResult, Results, read_results

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
SHIPPED = Path(__file__).parent / "results" / "miniature" / "results.json"
PLOT = SHIPPED.with_name("tradeoff.png")

_TABLE = re.compile(r"\| set \| classes \|.*?\n\n", re.DOTALL)


def table(results: Results) -> str:
    """The README's table: CLIP*, the fine-tuned weights and the patched ones, the best of each row in bold."""
    final = f"{results.anchor_weight:g}"
    lines = [
        f"| set | classes | {BASELINE} | fine-tuned, unpatched | Open-VCLIP, anchor {final} |",
        "|---|---|---|---|---|",
        *(_row(result, (BASELINE, "0", final)) for result in results.protocols.values()),
    ]
    return "\n".join(lines) + "\n"


def _row(result: ProtocolResult, scorers: tuple[str, ...]) -> str:
    figures = {scorer: result.text(scorer) for scorer in scorers}
    best = max(figures.values(), key=float)
    name = result.protocol.rpartition("/")[2] + (" (trained on)" if result.closed else "")
    cells = (f"**{figure}**" if figure == best else figure for figure in figures.values())
    return f"| {name} | {result.classes} | {' | '.join(cells)} |"


def main(arguments: list[str]) -> None:
    if arguments:
        shutil.copyfile(Path(arguments[0]) / "results.json", SHIPPED)
    results = read_results(SHIPPED)
    text, replaced = _TABLE.subn(lambda _: table(results) + "\n", README.read_text(encoding="utf-8"))
    assert replaced == 1, f"{README} has {replaced} tables of the miniature, 1 was expected."
    README.write_text(text, encoding="utf-8")
    plot_tradeoff(PLOT, results)


if __name__ == "__main__":
    main(sys.argv[1:])
