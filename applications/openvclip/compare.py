"""`python -m applications.openvclip.compare` is `openvclip compare`."""

from applications.openvclip.commands.compare import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
