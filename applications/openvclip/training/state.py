"""The file that training resumes from: written whole or not at all; nothing in it is ever run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from interpolate.atomic import replacing


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write the state of training: tensors, numbers and texts in dicts and lists."""
    with replacing(path) as file:
        torch.save(state, file)


def load_state(path: Path) -> dict[str, Any]:
    """Read what `save_state` wrote, on the CPU."""
    return torch.load(path, map_location="cpu", weights_only=True)
