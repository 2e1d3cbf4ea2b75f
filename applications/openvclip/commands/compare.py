"""Put the results of several evaluations in one table; unlike protocols are refused.

$ openvclip compare runs/a/results.json runs/b/results.json
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import tyro


def main(arguments: Sequence[str] | None = None) -> None:
    tyro.cli(compare, prog="openvclip compare", description=__doc__, args=arguments)


def compare(results: tyro.conf.Positional[tuple[Path, ...]]) -> None:
    """Print a Markdown table of several evaluations.

    Args:
        results: Their results.json files.
    """
    from applications.openvclip.zeroshot import tables
    from applications.openvclip.zeroshot.results import read_results

    print(tables.compare({str(path.parent): read_results(path) for path in results}))
