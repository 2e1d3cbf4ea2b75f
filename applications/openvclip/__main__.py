"""The console script: `openvclip VERB …`.

Exit codes: 0 done, 1 a video that `predict` could not read, or a fault of this program with its traceback, 2 bad input
with one message, 130 interrupted (but 0 where `train` is, once it has begun: it says how it goes on), 141 nobody reads
what is printed any more.
"""

from __future__ import annotations

import dis
import importlib
import os
import signal
import sys
from collections.abc import Sequence
from types import TracebackType

VERBS = {
    "train": "fine-tune, average, patch and evaluate: the built-in miniature, or a recipe of the paper",
    "evaluate": "a finished run again, or weights from elsewhere, under the paper's protocols or your own",
    "reproduce": "the paper's figures again: the published weights under its protocols, and the difference",
    "predict": "what videos show, among labels of your own",
    "features": "the embeddings of many videos, in a file",
    "search": "such a file by words or by a video, as a list and a page",
    "calibrate": "how sure a run may be, and when a video shows none of the labels",
    "serve": "a live page on this machine: a video, labels, and the anchor weight under your hand",
    "export": "a model as one file that runs without this package: ONNX, or torch.export",
    "push": "a run to the Hugging Face hub, with a card that is made from it",
    "compare": "the results of several evaluations in one table",
    "inspect": "a data set before using it: its videos, its classes, and what can't be read",
}
"""Each is a module of `applications.openvclip.commands`, imported when it is chosen."""

USAGE = "\n".join(["usage: openvclip VERB …", "", *(f"  {verb:9} {does}" for verb, does in VERBS.items())])


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; a user's mistake ends it with one message and exit code 2."""
    verb, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if verb in ("-h", "--help"):
        print(f"{USAGE}\n\nopenvclip VERB --help has the options of each.")
        return
    if verb not in VERBS:
        print(f"openvclip: there is no {verb!r}.\n{USAGE}", file=sys.stderr)
        sys.exit(2)
    command = importlib.import_module(f"applications.openvclip.commands.{verb}")
    try:
        command.main(rest)
    except KeyboardInterrupt:
        print(f"openvclip {verb}: interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # who reads what is printed has enough, such as `head`; there is nobody to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is flushed at the end
        sys.exit(128 + signal.SIGPIPE)
    except Exception as error:
        if not is_mistake(error):
            raise
        print(f"openvclip {verb}: {error}", file=sys.stderr)
        sys.exit(2)


def is_mistake(error: Exception) -> bool:
    """Whether an error tells a user what to do, and is no fault of this program.

    What the operating system refuses is one, and what a `raise` of ours says. An error of the same kind out of another
    library, or out of the interpreter (too many values to unpack), was not foreseen: its traceback is worth more.
    """
    if isinstance(error, OSError):
        return True
    kinds = (ValueError, RuntimeError, FloatingPointError, ModuleNotFoundError)
    return isinstance(error, kinds) and _is_raised_here(error.__traceback__)


def _is_raised_here(traceback: TracebackType | None) -> bool:
    while traceback and traceback.tb_next:
        traceback = traceback.tb_next
    if traceback is None:
        return False
    package = traceback.tb_frame.f_globals.get("__name__", "").partition(".")[0]
    instruction = traceback.tb_frame.f_code.co_code[traceback.tb_lasti]
    return package in ("applications", "interpolate") and dis.opname[instruction] == "RAISE_VARARGS"


if __name__ == "__main__":
    main()
