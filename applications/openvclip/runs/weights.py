"""Weights on the disk: written whole or not at all."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from interpolate.atomic import replacing
from interpolate.checkpoints import Checkpoint
from interpolate.weights import Weights


def save_weights(path: Path, weights: Weights, metadata: dict[str, str]) -> None:
    """Write weights as safetensors, with metadata that says what they are."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    with replacing(path) as file:  # not save_file, whose files nobody but their owner may read
        file.write(save(tensors, metadata))


def load_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read weights and their metadata, on the CPU."""
    with Checkpoint(path) as checkpoint:
        return {name: checkpoint.tensor(name) for name in checkpoint.entries}, checkpoint.metadata


def fingerprint(weights: Weights) -> str:
    """A hash of names and values, to tell one set of weights from another."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(weights[name].detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
