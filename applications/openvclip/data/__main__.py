"""`python -m applications.openvclip.data inspect` is `openvclip inspect`."""

from applications.openvclip.__main__ import main

if __name__ == "__main__":
    main()
