"""Pretrained CLIPs by name."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

import open_clip
import torch
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


def load(name: str, pretrained: str | None, device: torch.device) -> PretrainedCLIP:
    """A model of open_clip with its tokenizer and normalisation.

    Args:
        name: Such as "ViT-B-16-quickgelu"; OpenAI's weights need the quickgelu variant.
        pretrained: A tag of open_clip such as "openai", downloaded when it is not in the cache, or a file.
        device: Where the model is put.

    Raises:
        ValueError: Unknown name, or no weights are named.
        RuntimeError: The weights can't be had.
    """
    if name not in open_clip.list_models():
        near = difflib.get_close_matches(name, ["miniature", *open_clip.list_models()])
        raise ValueError(f"model.name: {name!r} is neither 'miniature' nor a model of open_clip; near: {near}.")
    if not pretrained:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
        raise ValueError(f"model.pretrained: {name} needs weights, a file or one of open_clip's tags ({tags}).")
    clip = open_clip.create_model(name, pretrained=pretrained, device=device)
    if not isinstance(clip, CLIP):
        raise ValueError(f"model.name: {name} is a {type(clip).__name__} of open_clip; a plain CLIP is needed.")
    settings = open_clip.get_model_preprocess_cfg(clip)
    return PretrainedCLIP(
        clip=clip.eval(),
        tokenizer=open_clip.get_tokenizer(name),
        image_size=settings["size"][0],
        image_mean=settings["mean"],
        image_std=settings["std"],
    )
