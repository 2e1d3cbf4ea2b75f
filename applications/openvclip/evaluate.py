"""`python -m applications.openvclip.evaluate` is `openvclip evaluate`."""

from applications.openvclip.commands.evaluate import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
