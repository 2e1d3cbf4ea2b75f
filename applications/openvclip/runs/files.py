"""Files of a run: training state and weights. Written whole or not at all; nothing in them is ever run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from interpolate.atomic import replacing
from interpolate.weights import Weights


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write the state of training: tensors, numbers and texts in dicts and lists."""
    with replacing(path) as file:
        torch.save(state, file)


def load_state(path: Path) -> dict[str, Any]:
    """Read what `save_state` wrote, on the CPU."""
    return torch.load(path, map_location="cpu", weights_only=True)


def save_weights(path: Path, weights: Weights, metadata: dict[str, str]) -> None:
    """Write weights as safetensors, with metadata that says what they are."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    with replacing(path) as file:  # not save_file, whose files nobody but their owner may read
        file.write(save(tensors, metadata))


def load_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the weights and the metadata of a safetensors file, on the CPU."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


def write_text(path: Path, text: str) -> None:
    """Write a text file."""
    with replacing(path) as file:
        file.write(text.encode())
