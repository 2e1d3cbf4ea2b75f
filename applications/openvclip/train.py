"""`python -m applications.openvclip.train` is `openvclip train`."""

import sys

from applications.openvclip.__main__ import main as openvclip
from applications.openvclip.commands.train import main

__all__ = ["main"]

if __name__ == "__main__":
    openvclip(["train", *sys.argv[1:]])
