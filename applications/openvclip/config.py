"""The configuration of a run. Nothing heavy is imported here, so that `--help` answers at once."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import cattrs

Method = Literal["open-vclip", "fine-tuning", "iwr", "swa", "l2"]


@dataclass(frozen=True)
class ModelConfig:
    """Which CLIP to start from, and how it looks at videos."""

    name: str = "miniature"
    """The built-in "miniature", or a name of open_clip such as ViT-B-16-quickgelu."""
    pretrained: str | None = None
    """Weights of that model: a tag of open_clip such as openai, or a file."""
    edge: Literal["mask", "zero"] = "mask"
    """What the first and last frame of a clip see beyond it: nothing, or the zeros that published weights expect."""


@dataclass(frozen=True)
class DataConfig:
    """Which videos, and what a clip of them is."""

    train: str | None = None
    """Videos to train on: a folder of class folders or a list in any known layout; by default those of the
    miniature."""
    train_root: str | None = None
    """Where the videos are that such a list names; by default the list's folder."""
    train_names: str | None = None
    """JSON file of class names to use instead of the tidied ones."""
    test: tuple[str, ...] = ()
    """The same to test on, a set each; by default those of the miniature."""
    templates: Literal["actions", "objects"] = "objects"
    """Sentences that class names are put into: the 28 published ones for actions, or 4 for objects."""
    frames: int = 4
    """Frames of a clip."""
    stride: float = 4
    """Distance of neighbouring frames of a clip, in frames at target_fps."""
    target_fps: float | None = None
    """Frame rate in which stride counts; by default each video's own."""
    sampler: Literal["dense", "slowfast-offset", "slowfast-uniform", "segment"] = "dense"
    """How a clip's frames are placed: evenly, as the published code does with or without its offset sampling, or one
    in each of as many equal segments."""
    max_short_side: float = 1.0
    """Training: the short side is drawn between the crop's and this many times it."""
    horizontal_flip: bool = False
    """Training: mirror half of the clips."""
    colour_jitter: float = 0.0
    """Training: vary brightness, contrast and saturation by up to this fraction."""
    workers: int = 2
    """Processes that decode videos."""
    time_limit_s: float = 60.0
    """Seconds that reading one video may take; then its process is replaced, and the video counts as unreadable."""
    cache_gb: float = 20.0
    """Disk space for videos that are read from URLs."""


@dataclass(frozen=True)
class OptimizationConfig:
    """AdamW, its schedule, and how long."""

    epochs: int = 3
    batch_size: int = 32
    learning_rate: float = 1e-3
    """Highest learning rate, reached after warm-up."""
    lowest_learning_rate: float = 0.0
    """Where warm-up starts and where a cosine schedule ends."""
    warmup_epochs: float = 0.3
    schedule: Literal["constant", "cosine"] = "constant"
    """What the learning rate does after warm-up."""
    weight_decay: float = 0.01
    """Of matrices; vectors and scalars have none."""
    betas: tuple[float, float] = (0.9, 0.98)
    max_gradient_norm: float = 1.0


@dataclass(frozen=True)
class RegularizerConfig:
    """Interpolated weight regularization."""

    max_alpha: float = 0.6
    """Each step draws the weight of the anchor between 0 and this."""
    strength: float = 0.5
    """Weight of the gradient at the interpolated weights."""


@dataclass(frozen=True)
class AveragerConfig:
    """Stochastic weight averaging."""

    start_epoch: float = 1.5
    """Epochs before the first cycle of averaging begins."""
    snapshots_per_epoch: int = 30


@dataclass(frozen=True)
class EvaluationConfig:
    """Zero-shot evaluation along the path from the fine-tuned average to the anchor."""

    anchor_weight: float = 0.5
    """Weight of the anchor in the final model."""
    anchor_weights: tuple[float, ...] = (0.0, 0.2, 0.4, 0.5, 0.6, 0.8, 1.0)
    """Weights of the anchor in the trade-off curve."""
    views: int = 1
    """Clips of each video, whose scores are added."""
    crops: Literal[1, 3] = 1
    """Crops of each clip along its longer side."""
    batch_size: int = 40
    """Videos at a time."""
    protocols: tuple[str, ...] = ()
    """Published protocols such as ucf101/EP1, or JSON files of your own; besides the sets of data.test."""
    videos: dict[str, str] = field(default_factory=dict)
    """Where the videos of each data set are: ucf101 FOLDER hmdb51 FOLDER, and so on."""
    lists: dict[str, str] = field(default_factory=dict)
    """Where the lists of each data set are that a protocol needs."""
    unreadable: Literal["wrong", "left-out"] = "wrong"
    """What a video is that can't be read: a wrong answer, or no part of the set."""


@dataclass(frozen=True)
class Config:
    """A complete run: train, average, patch, evaluate."""

    recipe: str
    method: Method = "open-vclip"
    """What to train with. The others are the paper's baselines: fine-tuning (with the patch at anchor weights above 0),
    iwr or swa alone, and l2: averaging with a penalty on the distance to the anchor in place of iwr."""
    seed: int = 0
    """Of the sets of the miniature, the order of videos, their augmentation, and alpha."""
    output: Path | None = None
    """Folder of the run; an unfinished run there is continued. By default a new one under runs/."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimization: OptimizationConfig = field(default_factory=OptimizationConfig)
    regularizer: RegularizerConfig = field(default_factory=RegularizerConfig)
    averager: AveragerConfig = field(default_factory=AveragerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)


_converter = cattrs.Converter(forbid_extra_keys=True, detailed_validation=False)
_converter.register_unstructure_hook(Path, str)
_converter.register_structure_hook(Path, lambda value, _: Path(value))


def to_dict(config: Config) -> dict[str, Any]:
    """The configuration as plain values, for JSON."""
    return _converter.unstructure(config)


def to_json(config: Config) -> str:
    return json.dumps(to_dict(config), indent=2) + "\n"


def from_json(text: str) -> Config:
    """The configuration that `to_json` wrote; unknown fields are an error."""
    return _converter.structure(json.loads(text), Config)


def differences(old: Config, new: Config) -> list[str]:
    """The fields that differ, as "data.frames: 4, now 8"."""

    def flat(value: object, name: str) -> dict[str, object]:
        if not isinstance(value, dict):
            return {name: value}
        return {key: leaf for part in value for key, leaf in flat(value[part], f"{name}.{part}").items()}

    before, after = (flat(to_dict(config), "") for config in (old, new))
    return [f"{name[1:]}: {before[name]}, now {after[name]}" for name in before if before[name] != after[name]]
