"""From a configuration to the objects of a run; whatever can be wrong with it is found here, before the first video."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from applications.openvclip import distributed
from applications.openvclip.config import Config, DataConfig, EvaluationConfig, Method, ModelConfig, to_dict
from applications.openvclip.data import layouts
from applications.openvclip.data.dataset import TrainingClips
from applications.openvclip.data.loader import TrainingOrder, training_batches
from applications.openvclip.data.manifest import Manifest
from applications.openvclip.data.storage import Cache
from applications.openvclip.data.transforms import Normalisation, normalised
from applications.openvclip.miniature import tasks, tiny_clip
from applications.openvclip.model import pretrained
from applications.openvclip.model.classifier import class_embeddings
from applications.openvclip.model.precision import Precision
from applications.openvclip.model.pretrained import PretrainedCLIP
from applications.openvclip.model.prompts import TEMPLATES
from applications.openvclip.model.video_encoder import VideoEncoder
from applications.openvclip.ranges import check, evaluation_ranges, training_ranges
from applications.openvclip.runs.folder import RunFolder, new_path
from applications.openvclip.runs.journal import Journal
from applications.openvclip.training.l2_penalty import L2Penalty
from applications.openvclip.training.optimisation import LearningRate, adamw
from applications.openvclip.training.trainer import Trainer
from applications.openvclip.zeroshot.evaluation import Evaluation, embedded
from applications.openvclip.zeroshot.one_pass import Reading
from applications.openvclip.zeroshot.protocols import Protocol, Sources, named
from interpolate import InterpolatedWeightRegularizer, SWAAverager
from interpolate.weights import trainable_weights


@dataclass(frozen=True)
class Run:
    """What it takes to fine-tune, average, patch and evaluate."""

    settings: dict[str, Any]
    """The configuration as plain values, for the record."""
    folder: RunFolder
    journal: Journal
    clips: TrainingClips
    order: TrainingOrder
    clip: nn.Module
    """The whole CLIP, of which the trainer's model is the image tower."""
    anchor: dict[str, Tensor]
    """A copy of the pretrained weights; the model's own are trained."""
    trainer: Trainer
    batches: Callable[[TrainingOrder, Callable[[str, str, str], object]], Iterator[tuple[Tensor, Tensor]]]
    """Those of an order; calls back for every video that can't be read or was cut off (`loader.training_batches`)."""
    evaluation: Evaluation


def run(config: Config) -> Run:
    """Everything for one run."""
    o, d = config.optimization, config.data
    if d.train is None:
        raise ValueError(f"--data.train: {config.model.name} needs videos to train on, a folder or a list of them.")
    check(training_ranges(config))
    check(evaluation_ranges(config, "evaluation.", "data."))
    source = clip(config.model)
    training_set = data_set(d.train, d.train_root, d.train_names, seed=config.seed)
    model = VideoEncoder(source.clip, edge=config.model.edge)
    if o.batch_size > len(training_set):
        raise ValueError(
            f"--optimization.batch-size: must be at most {len(training_set)}, the videos of {d.train}, "
            f"got {o.batch_size}."
        )
    steps_per_epoch = len(training_set) // o.batch_size
    order = TrainingOrder(len(training_set), o.batch_size, config.seed, 0, o.epochs * steps_per_epoch)
    averaged = averager(config.method, model, config, steps_per_epoch)
    evaluated = evaluation(source, config, protocols(config, training_set.classes))
    folder = RunFolder(config.output or new_path(config.recipe))
    journal = Journal(folder.journal)
    trainer = Trainer(
        model,
        class_embeddings=class_embeddings(source.clip, source.tokenizer, training_set.classes, TEMPLATES[d.templates]),
        optimizer=adamw(model, o.weight_decay, o.betas),
        learning_rate=LearningRate(
            highest=o.learning_rate,
            lowest=o.lowest_learning_rate,
            warmup_steps=round(o.warmup_epochs * steps_per_epoch),
            total_steps=order.last_step,
            schedule=o.schedule,
        ),
        regularizer=regularizer(config.method, model, config),
        averager=averaged,
        max_gradient_norm=o.max_gradient_norm,
        journal=journal,
        videos=training_set.hash,
    )
    clips = TrainingClips(training_set, config.sampling, source.image_size, config.augmentation, config.seed, cache(d))
    return Run(
        settings=to_dict(config),
        folder=folder,
        journal=journal,
        clips=clips,
        order=order,
        clip=source.clip,
        anchor=anchor(source),
        trainer=trainer,
        batches=lambda order, on_fault: on_device(
            training_batches(clips, order, workers=d.workers, time_limit_s=d.time_limit_s, on_fault=on_fault),
            normalisation(source),
        ),
        evaluation=evaluated,
    )


def on_device(
    batches: Iterable[tuple[Tensor, Tensor]], normalisation: Normalisation
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches travel as bytes, and become the numbers that the encoder takes on the device that computes with them."""
    device = distributed.device()
    for clips, labels in batches:
        yield normalised(clips.to(device), normalisation), labels.to(device)


def evaluation(source: PretrainedCLIP, config: Config, protocols: Sequence[Protocol]) -> Evaluation:
    """CLIP* and the weights along the path, under these protocols."""
    e, d = config.evaluation, config.data
    return Evaluation(
        clip=source.clip,
        edge=config.model.edge,
        protocols=protocols,
        passes=embedded(protocols, source.clip, source.tokenizer),
        anchor_weights=(e.anchor_weight, *e.anchor_weights),
        precision=Precision(e.precision, distributed.device()),
        compile=e.compile,
        reading=Reading(
            size=source.image_size,
            normalisation=normalisation(source),
            workers=d.workers,
            time_limit_s=d.time_limit_s,
            batch_size=e.batch_size,
            cache=cache(d),
        ),
    )


def clip(model: ModelConfig) -> PretrainedCLIP:
    """The CLIP to start from, on the GPU where there is one."""
    if model.name == "miniature":
        return tiny_clip.load_pretrained(distributed.device())
    return pretrained.load(model.name, model.pretrained, distributed.device())


def anchor(source: PretrainedCLIP) -> dict[str, Tensor]:
    """A copy of the weights that are fine-tuned."""
    return {name: p.detach().clone() for name, p in trainable_weights(VideoEncoder(source.clip)).items()}


def data_set(source: str, root: str | None = None, names: str | None = None, *, seed: int = 0) -> Manifest:
    """Videos and their classes: a set of the miniature, made where it is not there yet, or one in a known layout.

    Args:
        source: Such as "miniature:train"; or a folder or list (`layouts.read_dataset`).
        root: Where the videos are that a list names; by default the list's folder.
        names: JSON file of class names to use instead of the tidied ones.
        seed: Of the sets of the miniature.
    """
    found = built_in(source, seed)
    return layouts.read_dataset(source, root, names) if found is None else found


def built_in(source: str, seed: int) -> Manifest | None:
    """A set of the miniature, if the source is one."""
    world, _, name = source.partition(":")
    if world != "miniature":
        return None
    sets = tasks.draw_sets(seed, 1)  # their names, before any video is made
    if name not in sets:
        raise ValueError(f"{source}: there is no such set; the miniature has {', '.join(sets)}.")
    return tasks.prepare(seed)[name]


def protocols(config: Config, training_classes: Collection[str]) -> list[Protocol]:
    """What a run is evaluated on: the sets of `data.test`, and published protocols.

    Sets of the same name are named by where they are; what has the classes of training is the closed set.
    """
    manifests = {source: data_set(source, seed=config.seed) for source in config.data.test}
    names = Counter(manifest.name for manifest in manifests.values())
    own = [
        Protocol(
            manifest.name if names[manifest.name] == 1 else source,
            (manifest,),
            TEMPLATES[config.data.templates],
            config.sampling,
            unreadable=config.evaluation.unreadable,
        )
        for source, manifest in manifests.items()
    ]
    found = own + published_protocols(config.evaluation, config.seed)
    closed = set(training_classes)
    return [replace(p, closed=p.closed or {c for part in p.parts for c in part.classes} == closed) for p in found]


def published_protocols(e: EvaluationConfig, seed: int) -> list[Protocol]:
    """Those that are asked for by name or file."""
    sources = {name: Sources(root, e.lists.get(name), seed) for name, root in e.videos.items()}
    return [named(name, sources, e.unreadable, lambda source: built_in(source, seed)) for name in e.protocols]


def normalisation(source: PretrainedCLIP) -> Normalisation:
    return Normalisation(source.image_mean, source.image_std)


def cache(data: DataConfig) -> Cache:
    return Cache(max_bytes=round(data.cache_gb * 1e9))


def regularizer(method: Method, model: nn.Module, config: Config) -> InterpolatedWeightRegularizer | L2Penalty:
    """What keeps the weights near the anchor while training."""
    if method in ("open-vclip", "iwr"):
        r = config.regularizer
        return InterpolatedWeightRegularizer(model, r.max_alpha, r.strength, seed=config.seed)
    return L2Penalty(model, strength=1.0 if method == "l2" else 0.0)


def averager(method: Method, model: nn.Module, config: Config, steps_per_epoch: int) -> SWAAverager:
    """The mean of the weights; without averaging, of the last weights alone."""
    if method in ("fine-tuning", "iwr"):
        return SWAAverager(model, start_step=config.optimization.epochs * steps_per_epoch - 1)
    a, epochs = config.averager, config.optimization.epochs
    start, cycle = round(a.start_epoch * steps_per_epoch), max(1, steps_per_epoch // a.snapshots_per_epoch)
    if start + cycle > epochs * steps_per_epoch:
        raise ValueError(
            f"--averager.start-epoch: {a.start_epoch:g} leaves nothing to average: the first snapshot would be after "
            f"step {start + cycle}, and --optimization.epochs {epochs} has {epochs * steps_per_epoch} steps."
        )
    return SWAAverager(model, start_step=start, cycle_steps=cycle)
