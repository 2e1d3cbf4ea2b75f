"""The console script: `openvclip VERB …`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

VERBS = {
    "train": "fine-tune, average, patch and evaluate: the built-in miniature, or a recipe of the paper",
    "evaluate": "a finished run again, or weights from elsewhere, under the paper's protocols or your own",
    "compare": "the results of several evaluations in one table",
    "inspect": "a data set before using it: its videos, its classes, and what can't be read",
}
"""Each is a module of `applications.openvclip.commands`, imported when it is chosen."""

USAGE = "\n".join(["usage: openvclip VERB …", "", *(f"  {verb:9} {does}" for verb, does in VERBS.items())])


def main(arguments: Sequence[str] | None = None) -> None:
    verb, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if verb in ("-h", "--help"):
        print(f"{USAGE}\n\nopenvclip VERB --help has the options of each.")
    elif verb in VERBS:
        importlib.import_module(f"applications.openvclip.commands.{verb}").main(rest)
    else:
        print(f"openvclip: there is no {verb!r}.\n{USAGE}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
