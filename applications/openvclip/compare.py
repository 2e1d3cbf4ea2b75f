"""`python -m applications.openvclip.compare` is `openvclip compare`."""

import sys

from applications.openvclip.__main__ import main as openvclip
from applications.openvclip.commands.compare import main

__all__ = ["main"]

if __name__ == "__main__":
    openvclip(["compare", *sys.argv[1:]])
