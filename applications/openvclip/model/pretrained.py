"""Weights that people have: open_clip's by name, and files of open_clip, OpenAI, Hugging Face and Open-VCLIP."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import fsspec
import open_clip
import torch
from open_clip.model import CLIP
from open_clip.transformer import QuickGELU
from torch import Tensor

from applications.openvclip.model.clip import PretrainedCLIP
from interpolate.checkpoints import Checkpoint
from interpolate.weights import check_match

Form = Literal["open_clip", "OpenAI", "Hugging Face", "Open-VCLIP"]


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
        told = f"; near: {', '.join(near)}" if near else ""
        raise ValueError(f"model.name: {name!r} is neither 'miniature' nor a model of open_clip{told}.")
    tags = open_clip.list_pretrained_tags_by_model(name)
    if not pretrained:
        raise ValueError(
            f"model.pretrained: {name} needs weights, a file or one of open_clip's tags ({', '.join(tags) or 'none'})."
        )
    if pretrained == "openai" and f"{name}-quickgelu" in open_clip.list_models():
        name = f"{name}-quickgelu"
    found = None if pretrained in tags else _read(name, pretrained)
    clip = _from_tag(name, pretrained) if found is None else _with_weights(name, pretrained, found)
    if not isinstance(clip, CLIP):
        raise ValueError(f"model.name: {name} is a {type(clip).__name__} of open_clip; a plain CLIP is needed.")
    settings = open_clip.get_model_preprocess_cfg(clip)
    return PretrainedCLIP(
        clip=clip.to(device).eval(),
        tokenizer=open_clip.get_tokenizer(name),
        image_size=settings["size"][0],
        image_mean=settings["mean"],
        image_std=settings["std"],
        is_of_video=found is not None and found.form == "Open-VCLIP",
    )


def _from_tag(name: str, tag: str) -> torch.nn.Module:
    try:
        return open_clip.create_model(name, pretrained=tag)
    except Exception as error:  # the hub's clients raise errors of their own, and of the libraries below them
        raise RuntimeError(
            f"the weights {tag!r} of {name} are not in the cache and could not be downloaded "
            f"({type(error).__name__}). Where there is no network, give --model.pretrained a file of them."
        ) from error


def _read(name: str, path: str) -> Pretrained:
    try:
        return read_file(path)
    except FileNotFoundError as error:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name))
        raise ValueError(
            f"model.pretrained: {path!r} is neither a file nor one of open_clip's tags for {name} ({tags})."
        ) from error


def _with_weights(name: str, path: str, found: Pretrained) -> torch.nn.Module:
    clip = open_clip.create_model(name)
    check_activation(clip, path, found)
    own = {key: tensor for key, tensor in clip.state_dict().items() if key in dict(clip.named_parameters())}
    check_match(own, found.weights)
    clip.load_state_dict(found.weights, strict=False)
    return clip


class Pretrained(NamedTuple):
    """What `read_file` finds."""

    weights: dict[str, Tensor]
    """In float32 and under open_clip's names."""
    form: Form
    """Whose names they had. "Open-VCLIP" is a checkpoint of the published code, every name of which begins with
    `model.`; its encoder needs `edge="zero"`."""
    quick_gelu: bool | None
    """Whether they were trained with QuickGELU; None where nothing tells."""
    patched: bool
    """Whether the file says that an anchor is mixed into them, as a run's and `interpolate patch` do."""


def check_activation(clip: torch.nn.Module, path: str, found: Pretrained) -> None:
    """See that weights go with the activation of a model, which their names and shapes say nothing of.

    Raises:
        ValueError: They were trained with another.
    """
    has = any(isinstance(module, QuickGELU) for module in clip.modules())
    if found.quick_gelu is not None and found.quick_gelu != has:
        needed, named = ("QuickGELU", "with") if found.quick_gelu else ("plain GELU", "without")
        raise ValueError(
            f"{path} holds {found.form} weights, which need {needed}: use the --model.name {named} -quickgelu."
        )


def read_file(path: str | Path) -> Pretrained:
    """The weights of a CLIP in any file, folder or URL that `interpolate.checkpoints` reads; nothing in it is run.

    Args:
        path: Such as OpenAI's archive, a folder of Hugging Face, or `PATH::KEY` if there are several sets of weights.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It holds no weights of a CLIP, or several sets of weights.
    """
    with Checkpoint(path) as checkpoint:
        weights = {name: checkpoint.tensor(name) for name in checkpoint.entries}
    form: Form = "open_clip"
    if any(key.startswith("model.visual.") for key in weights):
        weights = {key.removeprefix("model."): value for key, value in weights.items() if key.startswith("model.")}
        form = "Open-VCLIP"
    elif any(key.startswith("vision_model.") for key in weights):
        weights = _from_hugging_face(weights)
        form = "Hugging Face"
    elif _OPENAI & weights.keys():
        form = "OpenAI"
    if "visual.conv1.weight" not in weights:
        raise ValueError(f"{path} holds no weights of a CLIP, but {len(weights)} tensors: {list(weights)[:3]}, ….")
    quick_gelu = True if form in ("OpenAI", "Open-VCLIP") else None
    if form == "Hugging Face":
        quick_gelu = _asks_for_quickgelu(checkpoint.path)
    mask = re.compile(r"(^|\.)attn_mask$")  # no weight, whether it lies at the top or in each layer
    weights = {k: value.float() for k, value in weights.items() if k not in _OPENAI and not mask.search(k)}
    return Pretrained(weights, form, quick_gelu, _is_patched(checkpoint.metadata))


def _is_patched(metadata: Mapping[str, str]) -> bool:
    recipe = metadata.get("interpolate", "")
    return '"operation": "patch"' in recipe or metadata.get("content", "").startswith("patched")


def _asks_for_quickgelu(path: str) -> bool | None:
    """Whether the `config.json` beside Hugging Face's weights names QuickGELU, as OpenAI's does; None if nothing names
    an activation."""
    fs, weights = fsspec.core.url_to_fs(path)
    config = f"{weights.rpartition('/')[0]}/config.json"
    found = fs.cat_file(config) if fs.exists(config) else b""
    return b'"quick_gelu"' in found if b'"hidden_act"' in found else None


_OPENAI = {"input_resolution", "context_length", "vocab_size"}
"""Numbers that OpenAI keeps among the weights, and nobody else."""

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
