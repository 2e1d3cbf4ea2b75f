"""Evaluate a finished run again, at any anchor weights.

python -m applications.openvclip.evaluate runs/miniature-…
python -m applications.openvclip.evaluate runs/miniature-… --anchor-weights 0.3 0.5 0.7
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import tyro


def main(arguments: Sequence[str] | None = None) -> None:
    tyro.cli(evaluate, prog="python -m applications.openvclip.evaluate", description=__doc__, args=arguments)


def evaluate(run: tyro.conf.Positional[Path], anchor_weights: tuple[float, ...] = ()) -> None:
    """Evaluate a finished run again.

    Args:
        run: Folder of the run.
        anchor_weights: Weights of the anchor to evaluate at; by default those of the run.
    """
    from applications.openvclip import experiment  # torch and the like take seconds; --help must not wait for them
    from applications.openvclip.run_folder import RunFolder

    experiment.reevaluate(RunFolder(run), anchor_weights)


if __name__ == "__main__":
    main()
