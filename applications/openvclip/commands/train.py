"""Train a video CLIP with interpolated weight optimization, and show what it gained and what it kept.

python -m applications.openvclip.train                         # the built-in miniature
python -m applications.openvclip.train miniature --optimization.epochs 1
python -m applications.openvclip.train --help
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import tyro

from applications.openvclip.config import Config
from applications.openvclip.recipes import RECIPES


def parse(arguments: Sequence[str]) -> Config:
    """A recipe by name (by default miniature), its fields overridden by options."""
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help")):
        arguments = ["miniature", *arguments]
    recipes = {name: ((recipe.__doc__ or "").strip(), recipe()) for name, recipe in RECIPES.items()}
    return tyro.extras.overridable_config_cli(
        recipes, prog="python -m applications.openvclip.train", description=__doc__, args=arguments
    )


def main(arguments: Sequence[str] | None = None) -> None:
    config = parse(sys.argv[1:] if arguments is None else arguments)
    from applications.openvclip import experiment  # torch and the like take seconds; --help must not wait for them

    try:
        experiment.train(config)
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command with --output and the run's folder goes on from the last whole epoch")


if __name__ == "__main__":
    main()
