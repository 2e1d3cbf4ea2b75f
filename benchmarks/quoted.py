"""What pages quote of results that are shipped: the miniature's table and plot, what things cost, docs/performance.md.

python benchmarks/quoted.py runs/miniature-…    # ship the results of a run, and quote them
python benchmarks/quoted.py                     # quote anew what is shipped
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

from applications.openvclip.runs.texts import markdown_table
from applications.openvclip.zeroshot.plot import plot_tradeoff
from applications.openvclip.zeroshot.results import BASELINE, ProtocolResult, Results, read_results
from benchmarks import costs

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
SHIPPED = Path(__file__).parent / "results" / "miniature" / "results.json"
PLOT = SHIPPED.with_name("tradeoff.png")

_TABLE = re.compile(r"\| set \| classes \|.*?\n\n", re.DOTALL)
PERFORMANCE = ROOT / "docs" / "performance.md"


def table(results: Results) -> str:
    """The README's table: CLIP*, the fine-tuned weights and the patched ones, the best of each row in bold."""
    final = f"{results.anchor_weight:g}"
    header = "set", "classes", BASELINE, "Open-VCLIP, unpatched", f"Open-VCLIP, anchor {final}"
    rows = (_row(result, (BASELINE, "0", final)) for result in results.protocols.values())
    return "\n".join(markdown_table(header, rows)) + "\n"


def _row(result: ProtocolResult, scorers: tuple[str, ...]) -> list[str]:
    figures = {scorer: result.text(scorer) for scorer in scorers}
    best = max(figures.values(), key=float)
    name = result.protocol.rpartition("/")[2] + (" (trained on)" if result.closed else "")
    return [name, str(result.classes), *(f"**{f}**" if f == best else f for f in figures.values())]


def main(arguments: list[str]) -> None:
    if arguments:
        shutil.copyfile(Path(arguments[0]) / "results.json", SHIPPED)
    results = read_results(SHIPPED)
    text = README.read_text(encoding="utf-8")
    text, replaced = _TABLE.subn(lambda _: table(results) + "\n", text)
    assert replaced == 1, f"{README} has {replaced} tables of {_TABLE.pattern}, 1 was expected."
    README.write_text(text, encoding="utf-8")
    PERFORMANCE.write_text(costs.page(), encoding="utf-8")
    plot_tradeoff(PLOT, results)


if __name__ == "__main__":
    main(sys.argv[1:])
