"""`python -m applications.openvclip.train` is `openvclip train`."""

from applications.openvclip.commands.train import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
