"""Where a model comes from: a run, a file of weights, the hub, or pretrained weights alone."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from applications.openvclip import build
from applications.openvclip.config import Config, ModelConfig, from_dict
from applications.openvclip.data.sampling import Sampling
from applications.openvclip.inference.calibration import Calibration, read_calibrations
from applications.openvclip.model.clip import CLIP, PretrainedCLIP
from applications.openvclip.model.prompts import ACTION_TEMPLATES, OBJECT_TEMPLATES, TEMPLATES
from applications.openvclip.model.video_encoder import VideoEncoder
from applications.openvclip.recipes import miniature
from applications.openvclip.runs.folder import RunFolder
from applications.openvclip.runs.weights import fingerprint, load_weights
from applications.openvclip.training.checkpoints import Checkpoints
from interpolate import WeightMismatchError
from interpolate.checkpoints import Checkpoint


@dataclass(frozen=True)
class Loaded:
    """A pretrained CLIP, what was made of it, and how it is used."""

    source: PretrainedCLIP
    model: ModelConfig
    anchor: dict[str, Tensor]
    theta: dict[str, Tensor] | None
    """The fine-tuned weights; None where there are none."""
    anchor_weight: float
    sampling: Sampling
    templates: tuple[str, ...]
    metadata: dict[str, str]
    """Of the fine-tuned weights, as their run wrote it."""
    folder: RunFolder | None = None
    """Of the run, where it is one."""
    calibrations: Mapping[str, Calibration] = field(default_factory=dict)
    """By anchor weight; made with this sampling and these templates."""
    patched: bool = False
    """Whether the anchor is in `theta` already, so that its weight counts from there."""
    last: dict[str, Tensor] | None = None
    """What training ended with, of a run; `theta` is its average."""


def load(source: str | Path | None, model: ModelConfig) -> Loaded:
    """A model from wherever it is.

    Args:
        source: Folder of a run; or a file of fine-tuned weights, for which `model` names the anchor; or a model of the
            Hugging Face hub as OWNER/NAME; or None, for the pretrained weights of `model` alone.
        model: The anchor; of no account for a run, which has its own.

    Raises:
        FileNotFoundError: There is no such run or file.
        RuntimeError: The hub can't be reached or has no such model.
        ValueError: The file holds no weights of a CLIP.
        WeightMismatchError: Anchor and fine-tuned weights don't go together.
    """
    if source is None:
        return of_model(model)
    if (folder := RunFolder(Path(source))).config.exists() or folder.inside():
        return of_run(folder)
    if not Path(source).exists() and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(source)):
        return of_run(RunFolder(downloaded(str(source))))
    return of_file(str(source), model)


def of_run(folder: RunFolder) -> Loaded:
    """The averaged weights of a run, and the anchor it started from."""
    config = from_dict(folder.read_settings())
    beside = folder.path / (config.model.pretrained or "")
    if beside.is_file():  # of a run that was given away with its anchor
        config = replace(config, model=replace(config.model, pretrained=str(beside)))
    source = build.clip(config.model)
    anchor = build.anchor(source)
    averaged, last, metadata = so_far(folder, config, source.clip) if goes_on(folder) else finished(folder)
    if metadata["anchor"] != fingerprint(anchor):
        raise WeightMismatchError(
            f"{folder.path} was trained from other pretrained weights than {config.model.name} "
            f"{config.model.pretrained or ''} holds now (fingerprint {metadata['anchor']}, now {fingerprint(anchor)})."
        )
    theta, last = ({name: weights[name] for name in anchor} for weights in (averaged, last))
    return Loaded(
        source=source,
        model=config.model,
        anchor=anchor,
        theta=theta,
        last=last,
        anchor_weight=config.evaluation.anchor_weight,
        sampling=config.sampling,
        templates=TEMPLATES[config.data.templates],
        metadata=metadata,
        folder=folder,
        calibrations=read_calibrations(folder.calibration),
    )


Learnt = tuple[dict[str, Tensor], dict[str, Tensor], dict[str, str]]
"""The average of a run, its last weights, and their metadata."""


def goes_on(folder: RunFolder) -> bool:
    """Whether a run has learnt something since it last left weights, or has left none yet."""
    if not folder.averaged.exists():
        return True
    with Checkpoint(folder.averaged) as averaged:
        left_at = int(averaged.metadata.get("step", sys.maxsize))  # runs of the first version do not tell
    return max(Checkpoints(folder.checkpoints, keep=1).steps(), default=0) > left_at


def finished(folder: RunFolder) -> Learnt:
    """What a run has left at its end."""
    averaged, metadata = load_weights(folder.averaged)
    last = load_weights(folder.last)[0] if folder.last.exists() else averaged  # runs of the first version have none
    return averaged, last, metadata


def so_far(folder: RunFolder, config: Config, clip: CLIP, step: int | None = None) -> Learnt:
    """What a run had learnt at its last checkpoint, or at that of another step.

    Raises:
        FileNotFoundError: There is no checkpoint yet.
    """
    from applications.openvclip import training_run  # with all that trains, which a finished run does without

    checkpoints = Checkpoints(folder.checkpoints, keep=1)
    if not checkpoints.steps():
        raise FileNotFoundError(
            f"{folder.path} has neither {folder.averaged.name} nor a checkpoint: nothing is learnt."
        )
    encoder = VideoEncoder(clip)
    model = {name: tensor.detach().clone() for name, tensor in encoder.state_dict().items()}
    averager = training_run.averager(config.method, encoder, config)
    identity = {"classes": "", "pretrained weights": ""}
    state: dict[str, Any] = {"identity": identity, "step": {"model": model}}
    if averager:
        state["step"]["averager"] = averager.state_dict()
    step = checkpoints.load(state, part=True, step=step)
    averaged = model
    if averager:
        averager.load_state_dict(state["step"]["averager"])
        averaged = averager.weights if averager.n_averaged else model
    metadata = {"anchor": identity["pretrained weights"], "classes": identity["classes"], "step": str(step)}
    return averaged, model, metadata


def of_file(weights: str, model: ModelConfig) -> Loaded:
    """Fine-tuned weights that no run of this program made. The published ones are known by their names, and need the
    edge that they were trained with.

    Raises:
        WeightMismatchError: Their text tower is not the anchor's.
    """
    from applications.openvclip.model import pretrained  # with open_clip, whose imports take seconds

    found = pretrained.read_file(weights)
    if not model.name:
        raise ValueError(
            f"{weights} holds fine-tuned weights alone; the anchor is needed, too, by model and pretrained."
        )
    loaded = anchored(model)
    if model.name != "miniature":
        pretrained.check_activation(loaded.source.clip, weights, found)
    if other := other_text(found.weights, loaded.source.clip):
        raise WeightMismatchError(
            f"{weights} has another text tower than {model.name} {model.pretrained or ''}: {len(other)} of its tensors "
            f"differ, such as {other[0]}, and what is mixed here is the image tower alone. "
            + (
                "Open-VCLIP's own come from openai's."
                if found.form == "Open-VCLIP"
                else f"--model.pretrained {weights} uses both of its towers as they are, without an anchor."
            )
        )
    theta = {name: w for name, w in found.weights.items() if name.startswith("visual.") or name == "logit_scale"}
    if found.form == "Open-VCLIP":
        model = replace(model, edge="zero")
    at = 0.0 if found.patched else 0.5
    return replace(loaded, model=model, theta=theta, anchor_weight=at, patched=found.patched)


def twice(weights: str) -> str:
    """What to say where an anchor is mixed into weights that hold it already."""
    return f"{weights} is patched: an anchor is in it, and this one is mixed in once more; weight 0 is it as it is."


def other_text(weights: Mapping[str, Tensor], clip: CLIP) -> list[str]:
    """Tensors of the text tower that are not those of a CLIP, in whatever precision they were kept."""
    own = clip.state_dict()
    precisions = torch.float32, torch.float16, torch.bfloat16
    return [
        name
        for name, tensor in weights.items()
        if name in own and not name.startswith("visual.") and name != "logit_scale"
        if not any(torch.equal(own[name].to("cpu", kept).float(), tensor) for kept in precisions)
    ]


def of_model(model: ModelConfig) -> Loaded:
    """Pretrained weights alone.

    Raises:
        ValueError: They are those of a video model, and alone would look at every frame by itself.
    """
    loaded = anchored(model)
    if loaded.source.is_of_video:
        raise ValueError(
            f"--model.pretrained {model.pretrained} is a checkpoint of the published code, and no image model: give it "
            "as --weights, and as --model.pretrained what it was trained from, such as openai."
        )
    return loaded


def anchored(model: ModelConfig) -> Loaded:
    """Pretrained weights, of which nothing has been made yet."""
    source = build.clip(model)
    is_miniature = model.name == "miniature"
    return Loaded(
        source=source,
        model=model,
        anchor=build.anchor(source),
        theta=None,
        anchor_weight=1.0,
        sampling=miniature().sampling if is_miniature else Sampling(),
        templates=OBJECT_TEMPLATES if is_miniature else ACTION_TEMPLATES,
        metadata={},
    )


def downloaded(name: str, **options: Any) -> Path:
    """The folder of a model of the hub, which is that of a run.

    Raises:
        RuntimeError: It could not be had.
    """
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(name, **options))
    except Exception as error:  # the hub's client raises errors of its own, and of the libraries below it
        raise RuntimeError(
            f"{name} is no folder here, and no model of the Hugging Face hub that could be had "
            f"({type(error).__name__}: {str(error).splitlines()[0]})."
        ) from error
