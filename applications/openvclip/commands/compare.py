"""Put the results of several evaluations in one table; unlike protocols are refused.

$ openvclip compare runs/a runs/b/results.json
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import tyro


def main(arguments: Sequence[str] | None = None) -> None:
    tyro.cli(compare, prog="openvclip compare", description=__doc__, args=arguments)


def compare(results: tyro.conf.Positional[tuple[Path, ...]]) -> None:
    """Print a Markdown table of several evaluations.

    Args:
        results: Their results.json files, or the folders that hold them.
    """
    from applications.openvclip.zeroshot import tables
    from applications.openvclip.zeroshot.results import read_results

    if not results:
        raise ValueError("compare needs the results.json files to compare, or the folders of their runs; got none.")
    files = list(dict.fromkeys(path / "results.json" if path.is_dir() else path for path in results))
    folders = Counter(path.parent for path in files)
    named = {str(path.parent if folders[path.parent] == 1 else path): read_results(path) for path in files}
    print(tables.compare(named))
