"""`python -m applications.openvclip.evaluate` is `openvclip evaluate`."""

import sys

from applications.openvclip.__main__ import main as openvclip
from applications.openvclip.commands.evaluate import main

__all__ = ["main"]

if __name__ == "__main__":
    openvclip(["evaluate", *sys.argv[1:]])
