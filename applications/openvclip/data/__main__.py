"""`python -m applications.openvclip.data inspect` is `openvclip inspect`."""

import sys

from applications.openvclip.__main__ import main

if __name__ == "__main__":
    main(sys.argv[1:])
