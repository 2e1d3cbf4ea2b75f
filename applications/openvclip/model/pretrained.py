"""Pretrained CLIPs by name."""

from __future__ import annotations

from dataclasses import dataclass

from open_clip.model import CLIP

from applications.openvclip.model.classifier import Tokenizer


@dataclass
class PretrainedCLIP:
    """A CLIP and what is needed to feed it."""

    clip: CLIP
    tokenizer: Tokenizer
    image_size: int
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]
