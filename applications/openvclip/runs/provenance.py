"""Where results come from."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


def provenance() -> dict[str, Any]:
    """The command, the versions and the hardware that a result was made with."""
    packages = ("torch", "torchvision", "open_clip_torch", "decord2", "av", "numpy", "interpolate-weights")
    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "command": command(),
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), **{package: version(package) for package in packages}},
        "hardware": {
            "machine": platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "accelerator": accelerator,
        },
    }


def command() -> str:
    """The command line of this process, as one would type it again."""
    module = getattr(sys.modules["__main__"], "__spec__", None)
    program = ["python", "-m", module.name] if module else [Path(sys.argv[0]).name]
    return shlex.join([*program, *sys.argv[1:]])
