"""What `torch.save` and trainers wrote: the one place where anything is unpickled, and no code is ever run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import fsspec
import torch
from fsspec.implementations.local import LocalFileSystem
from torch import Tensor

from interpolate.errors import CheckpointError

_KEYS = "state_dict", "state_dict_ema", "current_model_state", "model_state", "model_state_dict", "model", "model_ema"
"""Where Lightning, timm, Open-VCLIP and others keep weights in what they pickle."""


def opened(path: str) -> Any:
    fs, target = fsspec.core.url_to_fs(path)
    return fs.open(target, "rb")


def unpickled(path: str, key: str) -> tuple[str, dict[str, Tensor], dict[str, str]]:
    """The named tensors in a file of `torch.save`, the key that they are under, if any, and texts beside that key."""
    fs, target = fsspec.core.url_to_fs(path)
    if isinstance(fs, LocalFileSystem):
        content = torch.load(target, map_location="cpu", weights_only=True, mmap=True)
    else:
        with opened(path) as file:
            content = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not named tensors.")
    candidates = [k for k in _KEYS if isinstance(content.get(k), Mapping)]
    if key and not isinstance(content.get(key), Mapping):
        raise CheckpointError(f"{path} has no weights under {key!r}; it has {candidates or list(content)[:5]}.")
    if not key and len(candidates) > 1:
        raise CheckpointError(
            f"{path} holds several sets of weights ({', '.join(candidates)}); pick one, as in {path}::{candidates[0]}."
        )
    key = key or "".join(candidates)
    weights = content[key] if key else content
    tensors = {name: tensor for name, tensor in weights.items() if isinstance(tensor, Tensor)}
    if not tensors:
        raise CheckpointError(f"{path} holds no tensors; its keys are {list(weights)[:5]}.")
    return key, tensors, {k: text for k, text in content.items() if key and isinstance(text, str)}
