"""Where results come from."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from contextlib import suppress
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, metadata, packages_distributions, version
from pathlib import Path
from typing import Any

import torch

_MODULES = ("torch", "torchvision", "open_clip", "av", "numpy")


def provenance() -> dict[str, Any]:
    """The command, the versions and the hardware that a result was made with."""
    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "command": command(),
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "versions": versions(),
        "hardware": {
            "machine": platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "accelerator": accelerator,
        },
    }


def versions() -> dict[str, str]:
    """Of Python and of every distribution that one of the modules comes from, whatever its name is."""
    found = packages_distributions()
    distributions = {name for module in _MODULES for name in found.get(module, ())}
    with suppress(PackageNotFoundError):  # in a checkout that is not installed; `commit` says which it is
        distributions.add(metadata("interpolate-weights")["Name"])
    return {"python": platform.python_version(), **{name: version(name) for name in sorted(distributions)}}


def commit() -> str | None:
    """The commit of the checkout that this code runs from, with "-dirty" where it has been changed; None elsewhere."""
    here = Path(__file__).resolve().parent
    command = ["git", "-C", str(here), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
    tracked = ["git", "-C", str(here), "ls-files", "--error-unmatch", __file__]  # not some other project around it
    try:
        subprocess.run(tracked, check=True, capture_output=True)  # noqa: S603 # git, with arguments of our own
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()  # noqa: S603 # likewise
    except (OSError, subprocess.CalledProcessError):
        return None


def command() -> str:
    """The command line of this process, as one would type it again."""
    module = getattr(sys.modules["__main__"], "__spec__", None)
    program = ["python", "-m", module.name.removesuffix(".__main__")] if module else [Path(sys.argv[0]).name]
    return shlex.join([*program, *sys.argv[1:]])
