"""The configuration of a run. Nothing heavy is imported here, so that `--help` answers at once."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import cattrs
from tyro import conf

from applications.openvclip.data.augmentation import Augmentation
from applications.openvclip.data.sampling import Sampling
from applications.openvclip.runs.strict import structured

Method = Literal["open-vclip", "fine-tuning", "iwr", "swa", "l2", "teacher", "open-vclip+teacher"]
Parallel = Literal["ddp", "fsdp2"]
Precision = Literal["fp32", "tf32", "bf16", "fp16"]


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
    """Which videos, and how they are read."""

    train: str | None = None
    """Videos to train on: a folder of class folders, a list in any known layout, or "miniature:train"."""
    train_root: str | None = None
    """Where the videos are that such a list names; by default the list's folder."""
    train_names: str | None = None
    """JSON file of class names to use instead of the tidied ones."""
    test: tuple[str, ...] = ()
    """The same to test on, a set each."""
    templates: Literal["actions", "objects"] = "actions"
    """Sentences that class names are put into: the 28 published ones for actions, or 4 for objects."""
    workers: int = 2
    """Processes that decode videos."""
    time_limit_s: float = 60.0
    """Seconds that reading one video may take; then its process is replaced, and the video counts as unreadable."""
    cache_gb: float = 20.0
    """Disk space for videos that are read from URLs."""
    decoded: Path | None = None
    """Folder in which decoded frames are kept, 3 bytes a pixel: for small sets that many runs read."""


@dataclass(frozen=True)
class OptimizationConfig:
    """AdamW, its schedule, and how long."""

    epochs: int = 3
    batch_size: int = 32
    """Clips of a step, over all processes."""
    micro_batch: int | None = None
    """Clips that a process takes together; divides the batch, which is one micro-batch by default. With an alpha for
    each it belongs to the method, and a run is the same on any number of processes."""
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
    alpha_per: Literal["micro-batch", "step"] = "micro-batch"
    """Whether every micro-batch draws its own, as published, or all of a step share one, as fsdp2 demands."""
    passes: Literal["both", "split", "random"] = "both"
    """Whether all clips pass the weights and the interpolated ones too, or, in half the time and with an unbiased but
    noisier gradient, half of them either or all of them one of the two, drawn at random."""
    every: int = 1
    """Interpolated weights have a part in every so many steps, so many times as strong: their gradient is as large on
    average, at a fraction of the cost."""


@dataclass(frozen=True)
class AveragerConfig:
    """Stochastic weight averaging."""

    start_epoch: float = 1.5
    """Epochs before the first cycle of averaging begins."""
    snapshots_per_epoch: int = 30


@dataclass(frozen=True)
class TeacherConfig:
    """The average of the weights as a teacher, in the methods of that name."""

    weight: float = 0.5
    """Weight of the teacher's answer in what is learnt; the label has the rest."""
    decay: float | None = 0.9998
    """Of the teacher, which begins at the anchor, for each step; None: it is the mean of the anchor and every step."""


@dataclass(frozen=True)
class CheckpointConfig:
    """When training is saved besides at its end and when it is stopped."""

    every_steps: int | None = None
    every_minutes: float = 10.0
    keep: int = 2
    """How many of the last checkpoints are kept."""


@dataclass(frozen=True)
class MachineConfig:
    """How the work is done on the machines at hand, whatever is learnt."""

    parallel: Parallel = "ddp"
    """With torchrun: a replica in each process, or, for models that are too large for that, shards of it."""
    precision: Precision = "fp32"
    """What matrices are multiplied in while training; weights and their averages are float32 and better."""
    clips_at_once: int | None = None
    """Clips of a micro-batch that go through the model together, by default all: what memory grows with."""
    activation_checkpointing: bool = False
    """Compute each block's activations again in the backward pass instead of keeping them."""
    compile: bool = False
    """Compile the model before training."""
    hang_limit_s: float = 600.0
    """Seconds that a step, after the first, may take before the processes that do not answer are named and all end."""
    tensorboard: bool = False
    """Write TensorBoard's events too, into the run's folder."""
    profile: bool = False
    """Write a trace of a few steps of the first process, for chrome://tracing, into the run's folder."""


@dataclass(frozen=True)
class EvaluationConfig:
    """Zero-shot evaluation along the path from the fine-tuned average to the anchor."""

    anchor_weight: float = 0.5
    """Weight of the anchor in the final model."""
    anchor_weights: tuple[float, ...] = (0.0, 0.2, 0.4, 0.5, 0.6, 0.8, 1.0)
    """Weights of the anchor in the trade-off curve."""
    batch_size: int = 40
    """Videos at a time."""
    protocols: tuple[str, ...] = ()
    """Published protocols such as ucf101/EP1, or JSON files of your own."""
    videos: dict[str, str] = field(default_factory=dict)
    """Where the videos of each data set are: ucf101 FOLDER hmdb51 FOLDER, and so on; folders or URLs."""
    lists: dict[str, str] = field(default_factory=dict)
    """Where the lists of each data set are that a protocol needs."""
    unreadable: Literal["wrong", "left-out"] = "wrong"
    """What a video is that can't be read: a wrong answer, or no part of the set."""
    precision: Precision = "fp32"
    """In which numbers scores are computed: float32, TF32 on a GPU, or autocast to bfloat16 or float16."""
    compile: bool = False
    """Whether to compile the model first, which takes minutes and pays where there are many videos."""


@dataclass(frozen=True)
class InTrainingConfig:
    """Evaluation of the average so far, at the anchor weights of the end, while training goes on."""

    every_epochs: int = 0
    """After every so many epochs; 0: at the end only. The checkpoint of the best is kept."""
    held_out: str | None = None
    """Name of the set or protocol to evaluate on beside the closed set; better none that is reported on."""
    best_by: Literal["closed", "held-out", "mean"] = "mean"
    """The best is that of the highest accuracy, at the anchor weight of the final model, on the one or the other, or in
    the mean of them."""


@dataclass(frozen=True)
class Config:
    """A complete run: train, average, patch, evaluate."""

    recipe: str
    method: Method = "open-vclip"
    """What to train with. The others are the paper's baselines: fine-tuning (with the patch at anchor weights above 0),
    iwr or swa alone, and l2: averaging with a penalty on the distance to the anchor in place of iwr. And, after TACO,
    teacher: averaging, with a moving average of the weights as a teacher in place of iwr, or beside it."""
    seed: int = 0
    """Of the sets of the miniature, the order of videos, their augmentation, and alpha."""
    output: Path | None = None
    """Folder of the run; an unfinished run there is continued. By default a new one under runs/."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    sampling: Sampling = field(default_factory=Sampling)
    augmentation: Augmentation = field(default_factory=Augmentation)
    optimization: OptimizationConfig = field(default_factory=OptimizationConfig)
    regularizer: RegularizerConfig = field(default_factory=RegularizerConfig)
    averager: AveragerConfig = field(default_factory=AveragerConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    machine: conf.OmitArgPrefixes[MachineConfig] = field(default_factory=MachineConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    in_training: InTrainingConfig = field(default_factory=InTrainingConfig)


FREE = (
    "output",
    "evaluation.",
    "in_training.",
    "checkpoint.",
    "data.train",
    "data.test",
    "data.workers",
    "data.time_limit_s",
    "data.cache_gb",
    "data.decoded",
    *(f"machine.{name}" for name in ("clips_at_once", "activation_checkpointing", "compile", "hang_limit_s")),
    *("machine.tensorboard", "machine.profile"),
)
"""Settings that change nothing of what is learnt, by the beginning of their names. Of the training set it is the videos
and their classes that count, not where they are; the trainer sees to that."""


def free(config: Config) -> tuple[str, ...]:
    """The settings of a run that may change when it goes on."""
    shared_alpha = ("optimization.micro_batch", "machine.parallel") if config.regularizer.alpha_per == "step" else ()
    open_ended = ("optimization.epochs",) if config.optimization.schedule == "constant" else ()
    return FREE + shared_alpha + open_ended


_converter = cattrs.Converter(unstruct_collection_overrides={tuple: list})
_converter.register_unstructure_hook(Path, str)


def to_dict(config: object) -> dict[str, Any]:
    """A configuration, or a part of one, as plain values for JSON."""
    return _converter.unstructure(config)


def from_dict(settings: dict[str, Any]) -> Config:
    """The configuration that `to_dict` took apart.

    Raises:
        ValueError: A setting is missing, unknown or of another type, as somebody has edited it.
    """
    return structured(settings, Config, "config.json")
