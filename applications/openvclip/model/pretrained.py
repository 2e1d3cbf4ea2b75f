"""Weights that people have: open_clip's by name, and files of open_clip, OpenAI, Hugging Face and Open-VCLIP."""

from __future__ import annotations

import difflib
import re
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import open_clip
import torch
from open_clip.model import CLIP
from safetensors.torch import load_file
from torch import Tensor

from applications.openvclip.model.classifier import Tokenizer
from interpolate.weights import check_match

Form = Literal["open_clip", "OpenAI", "Hugging Face", "Open-VCLIP"]


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
        name: Such as "ViT-B-16-quickgelu". OpenAI's weights belong to the quickgelu variant, which is taken for them.
        pretrained: A tag of open_clip such as openai, downloaded when it is not in the cache, or a file (`read_file`).
        device: Where the model is put.

    Raises:
        ValueError: Unknown name, no weights are named, or weights and model don't go together.
        WeightMismatchError: The file holds weights of another architecture.
        RuntimeError: The weights can't be had.
    """
    if name not in open_clip.list_models():
        near = difflib.get_close_matches(name, ["miniature", *open_clip.list_models()])
        raise ValueError(f"model.name: {name!r} is neither 'miniature' nor a model of open_clip; near: {near}.")
    tags = open_clip.list_pretrained_tags_by_model(name)
    if not pretrained:
        raise ValueError(
            f"model.pretrained: {name} needs weights, a file or one of open_clip's tags ({', '.join(tags) or 'none'})."
        )
    if pretrained == "openai" and f"{name}-quickgelu" in open_clip.list_models():
        name = f"{name}-quickgelu"
    clip = _from_file(name, Path(pretrained)) if Path(pretrained).exists() else _from_tag(name, pretrained)
    if not isinstance(clip, CLIP):
        raise ValueError(f"model.name: {name} is a {type(clip).__name__} of open_clip; a plain CLIP is needed.")
    settings = open_clip.get_model_preprocess_cfg(clip)
    return PretrainedCLIP(
        clip=clip.to(device).eval(),
        tokenizer=open_clip.get_tokenizer(name),
        image_size=settings["size"][0],
        image_mean=settings["mean"],
        image_std=settings["std"],
    )


def _from_tag(name: str, tag: str) -> torch.nn.Module:
    tags = open_clip.list_pretrained_tags_by_model(name)
    if tag not in tags:
        raise ValueError(
            f"model.pretrained: {tag!r} is neither a file nor one of open_clip's tags for {name} ({', '.join(tags)})."
        )
    try:
        return open_clip.create_model(name, pretrained=tag)
    except Exception as error:  # the hub's clients raise errors of their own, and of the libraries below them
        raise RuntimeError(
            f"the weights {tag!r} of {name} are not in the cache and could not be downloaded "
            f"({type(error).__name__}). Where there is no network, give --model.pretrained a file of them."
        ) from error


def _from_file(name: str, path: Path) -> torch.nn.Module:
    weights, form = read_file(path)
    quick = form in ("OpenAI", "Open-VCLIP") or (form == "Hugging Face" and _asks_for_quickgelu(path))
    if quick and not (open_clip.get_model_config(name) or {}).get("quick_gelu", False):
        raise ValueError(f"{path} holds {form} weights, which need QuickGELU: use --model.name {name}-quickgelu.")
    clip = open_clip.create_model(name)
    own = {key: tensor for key, tensor in clip.state_dict().items() if key in dict(clip.named_parameters())}
    check_match(own, {key: tensor for key, tensor in weights.items() if key != "attn_mask"})
    clip.load_state_dict(weights, strict=False)
    return clip


def _asks_for_quickgelu(path: Path) -> bool:
    """Whether the `config.json` beside Hugging Face's weights names QuickGELU, as it does for OpenAI's models."""
    config = (path if path.is_dir() else path.parent) / "config.json"
    return config.exists() and '"quick_gelu"' in config.read_text(encoding="utf-8")


def read_file(path: Path) -> tuple[dict[str, Tensor], Form]:
    """The weights in a file, in float32 and under open_clip's names.

    Args:
        path: A `.safetensors` file, a PyTorch file (nothing in it is run), OpenAI's TorchScript archive, or a folder of
            Hugging Face with `model.safetensors` or `pytorch_model.bin`.

    Returns:
        The weights, and whose form they had. "Open-VCLIP" is a checkpoint of the published code, every name of which
        begins with `model.`; its encoder needs `edge="zero"`.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It holds no weights of a CLIP.
    """
    if path.is_dir():
        found = [path / name for name in ("model.safetensors", "pytorch_model.bin") if (path / name).exists()]
        if not found:
            raise FileNotFoundError(f"{path} holds neither model.safetensors nor pytorch_model.bin.")
        path = found[0]
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file.")
    content, scripted = _read(path)
    for key in ("state_dict", "model_state"):
        content = content.get(key, content)
    weights = {key: value for key, value in content.items() if isinstance(value, Tensor)}
    weights = {key.removeprefix("module."): value for key, value in weights.items()}
    form: Form = "OpenAI" if scripted else "open_clip"
    if any(key.startswith("model.visual.") for key in weights):
        weights = {key.removeprefix("model."): value for key, value in weights.items() if key.startswith("model.")}
        form = "Open-VCLIP"
    elif any(key.startswith("vision_model.") for key in weights):
        weights = _from_hugging_face(weights)
        form = "Hugging Face"
    if "visual.conv1.weight" not in weights:
        raise ValueError(f"{path} holds no weights of a CLIP, but {len(weights)} tensors: {list(weights)[:3]}, ….")
    sizes = ("input_resolution", "context_length", "vocab_size")  # numbers that OpenAI keeps among the weights
    return {key: value.float() for key, value in weights.items() if key not in sizes}, form


def _read(path: Path) -> tuple[dict[str, Any], bool]:
    """What is in a file, and whether it is a TorchScript archive."""
    if path.suffix == ".safetensors":
        return load_file(path), False
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            scripted = any("/code/" in name for name in archive.namelist())
        if scripted:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # TorchScript is deprecated, and OpenAI's files are what they are
                return dict(torch.jit.load(path, map_location="cpu").state_dict()), True
    return torch.load(path, map_location="cpu", weights_only=True), False


_HUGGING_FACE = {
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm": "visual.ln_pre",
    "vision_model.post_layernorm": "visual.ln_post",
    "visual_projection.weight": "visual.proj",
    "text_model.embeddings.token_embedding": "token_embedding",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm": "ln_final",
    "text_projection.weight": "text_projection",
    "vision_model.encoder.layers.": "visual.transformer.resblocks.",
    "text_model.encoder.layers.": "transformer.resblocks.",
    ".self_attn.out_proj.": ".attn.out_proj.",
    ".layer_norm1.": ".ln_1.",
    ".layer_norm2.": ".ln_2.",
    ".mlp.fc1.": ".mlp.c_fc.",
    ".mlp.fc2.": ".mlp.c_proj.",
}


def _from_hugging_face(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names of transformers' `CLIPModel` → names of open_clip; queries, keys and values become one tensor."""
    converted = {}
    for key, value in weights.items():
        if key.endswith("position_ids") or re.search(r"self_attn\.[kv]_proj", key):
            continue
        name = key
        for theirs, ours in _HUGGING_FACE.items():
            name = name.replace(theirs, ours)
        if "self_attn.q_proj" in key:
            value = torch.cat([weights[key.replace("q_proj", f"{part}_proj")] for part in "qkv"])
            name = name.replace("self_attn.q_proj.", "attn.in_proj_")
        converted[name] = value.T.contiguous() if name in ("visual.proj", "text_projection") else value
    return converted
