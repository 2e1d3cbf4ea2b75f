"""Put the results of several evaluations in one table; unlike protocols are refused.

python -m applications.openvclip.compare runs/a/results.json runs/b/results.json
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import tyro


def main(arguments: Sequence[str] | None = None) -> None:
    tyro.cli(compare, prog="python -m applications.openvclip.compare", description=__doc__, args=arguments)


def compare(results: tyro.conf.Positional[tuple[Path, ...]]) -> None:
    """Print a Markdown table of several evaluations.

    Args:
        results: Their results.json files.
    """
    from applications.openvclip.zeroshot import report  # torch takes seconds; --help must not wait for it

    print(report.compare({str(path.parent): report.read_results(path) for path in results}))


if __name__ == "__main__":
    main()
