"""From a configuration to a run: what it takes to fine-tune, average, patch and evaluate.

Whatever can be wrong with a configuration is found here, before the first video.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor, nn

from applications.openvclip import distributed
from applications.openvclip.build import anchor, cache, clip, data_set, evaluation, normalisation, protocols
from applications.openvclip.config import (
    Config,
    InTrainingConfig,
    Method,
    free,
    to_dict,
)
from applications.openvclip.data.loader import MicroBatch, TrainingOrder, micro_batches
from applications.openvclip.data.training_clips import TrainingClips
from applications.openvclip.data.transforms import Normalisation, normalised
from applications.openvclip.model.clip import PretrainedCLIP
from applications.openvclip.model.precision import Precision
from applications.openvclip.model.prompts import TEMPLATES
from applications.openvclip.model.sharding import shard
from applications.openvclip.model.video_encoder import VideoEncoder
from applications.openvclip.ranges import check, evaluation_ranges, training_ranges
from applications.openvclip.runs.folder import RunFolder, flat, new_path
from applications.openvclip.runs.journal import Journal
from applications.openvclip.runs.weights import fingerprint
from applications.openvclip.training.checkpoints import Checkpoints
from applications.openvclip.training.evaluating import Accuracies, Evaluating
from applications.openvclip.training.l2_penalty import L2Penalty
from applications.openvclip.training.monitor import Monitor
from applications.openvclip.training.optimisation import LearningRate, adamw
from applications.openvclip.training.parallel import parallelised
from applications.openvclip.training.profile import Profile
from applications.openvclip.training.step import Step
from applications.openvclip.training.teacher import Teacher
from applications.openvclip.training.trainer import Saving, Trainer
from applications.openvclip.training.watch import Watch
from applications.openvclip.zeroshot.embeddings import kept_class_embeddings
from applications.openvclip.zeroshot.evaluation import Evaluation, embedded
from applications.openvclip.zeroshot.protocols import Protocol
from interpolate import InterpolatedWeightRegularizer, SWAAverager
from interpolate.weights import Weights

IWR: tuple[Method, ...] = ("open-vclip", "iwr", "open-vclip+teacher")
"""Methods that interpolate weights while training."""
TAUGHT: tuple[Method, ...] = ("teacher", "open-vclip+teacher")
"""Methods with a teacher in the loss."""


@dataclass(frozen=True)
class Run:
    """What it takes to fine-tune, average, patch and evaluate."""

    config: Config
    folder: RunFolder
    journal: Journal
    clips: TrainingClips
    order: TrainingOrder
    anchor: dict[str, Tensor]
    """A copy of the pretrained weights, on the CPU; the model's own are trained."""
    trainer: Trainer
    micro_batches: Callable[[int], Iterator[MicroBatch]]
    """Those of this process from a step on."""
    evaluation: Evaluation
    """Its CLIP is the one that is trained, or where weights are in shards one with weights of its own."""


def run(config: Config) -> Run:
    """Everything for one run; all processes call it together."""
    o, d, m = config.optimization, config.data, config.machine
    if d.train is None:
        raise ValueError(f"--data.train: {config.model.name} needs videos to train on, a folder or a list of them.")
    check(training_ranges(config))
    check(evaluation_ranges(config, "evaluation.", "data."))
    if config.output is not None:
        RunFolder(config.output).changes(to_dict(config), free(config))
    precision = Precision(m.precision, distributed.device())
    source = distributed.first_alone_first(lambda: clip(config.model))
    training_set = distributed.first_alone_first(
        lambda: data_set(d.train or "", d.train_root, d.train_names, seed=config.seed)
    )
    if o.batch_size > len(training_set):
        raise ValueError(
            f"--optimization.batch-size: must be at most {len(training_set)}, the videos of {d.train}, "
            f"got {o.batch_size}."
        )
    order = training_order(config, len(training_set))
    pretrained_weights = anchor(source)
    identity = {
        "videos": training_set.hash,
        "classes": json.dumps(training_set.classes),
        "pretrained weights": fingerprint(pretrained_weights),
    }
    distributed.check_alike(identity | flat(to_dict(replace(config, output=None))))
    to_evaluate = apart(source) if m.parallel == "fsdp2" else source
    step = training_step(source, config, order, precision, training_set.classes)
    evaluated = evaluation(to_evaluate, config, protocols(config, training_set.classes))
    in_training = evaluated_in_training(evaluated.protocols, config.in_training)
    folder = RunFolder(config.output or distributed.on_first(lambda: new_path(config.recipe)))
    journal = Journal(folder.journal)
    clips = TrainingClips(training_set, config.sampling, source.image_size, config.augmentation, config.seed, cache(d))
    trainer = Trainer(
        step,
        checkpoints=Checkpoints(folder.checkpoints, config.checkpoint.keep),
        saving=Saving(config.checkpoint.every_steps, config.checkpoint.every_minutes),
        watch=Watch(m.hang_limit_s),
        monitor=Monitor(journal, folder, order.last_step, order.batch_size, tensorboard=m.tensorboard)
        if distributed.rank() == 0
        else None,
        identity=identity,
        evaluating=evaluating(
            replace(evaluated, protocols=in_training, passes=embedded(in_training, evaluated.clip, source.tokenizer)),
            pretrained_weights,
            config,
            order.steps_per_epoch,
            folder.logits / "in-training",
        )
        if in_training
        else None,
        profile=Profile(folder.trace) if m.profile and distributed.rank() == 0 else None,
    )

    def batches_from(first_step: int) -> Iterator[MicroBatch]:
        return on_device(
            micro_batches(
                clips,
                replace(order, first_step=first_step),
                workers=d.workers,
                time_limit_s=d.time_limit_s,
                on_fault=lambda *fault: trainer.faults.append(fault),
            ),
            normalisation(source),
        )

    return Run(
        config=config,
        folder=folder,
        journal=journal,
        clips=clips,
        order=order,
        anchor=pretrained_weights,
        trainer=trainer,
        micro_batches=batches_from,
        evaluation=evaluated,
    )


def training_order(config: Config, n_samples: int) -> TrainingOrder:
    """Which videos a step takes, and which of them this process.

    Raises:
        ValueError: FSDP2 gathers weights on all processes together, and they would not stay together.
    """
    o = config.optimization
    order = TrainingOrder(
        n_samples,
        o.batch_size,
        o.micro_batch or o.batch_size,
        config.seed,
        first_step=0,
        last_step=o.epochs * (n_samples // o.batch_size),
        rank=distributed.rank(),
        world_size=distributed.world_size(),
    )
    if config.machine.parallel == "fsdp2":
        if config.regularizer.alpha_per != "step" and config.method in IWR:
            raise ValueError(
                "--parallel fsdp2: all processes see one set of interpolated weights at a time, so that an alpha for "
                "each micro-batch would depend on their number. Use --regularizer.alpha-per step."
            )
        if order.micro_batches % order.world_size:
            raise ValueError(
                f"--parallel fsdp2: every process needs as many micro-batches as the others, and {order.micro_batches} "
                f"are not to be shared out evenly among {order.world_size} processes."
            )
    return order


def training_step(
    source: PretrainedCLIP, config: Config, order: TrainingOrder, precision: Precision, classes: Sequence[str]
) -> Step:
    """The model as this and the other processes train it, and all that a step needs."""
    o, m = config.optimization, config.machine
    embeddings = kept_class_embeddings(source.clip, source.tokenizer, classes, TEMPLATES[config.data.templates])
    encoder = VideoEncoder(source.clip, edge=config.model.edge, activation_checkpointing=m.activation_checkpointing)
    if m.compile:
        encoder.compile()
    model = parallelised(encoder, m.parallel, shard)
    return Step(
        encoder,
        model,
        class_embeddings=embeddings,
        optimizer=adamw(encoder, o.weight_decay, o.betas),
        learning_rate=LearningRate(
            highest=o.learning_rate,
            lowest=o.lowest_learning_rate,
            warmup_steps=round(o.warmup_epochs * order.steps_per_epoch),
            total_steps=order.last_step,
            schedule=o.schedule,
        ),
        regularizer=regularizer(config.method, model, config),
        averager=averager(config.method, encoder, config, order.steps_per_epoch),
        max_gradient_norm=o.max_gradient_norm,
        order=order,
        alpha_per=config.regularizer.alpha_per,
        clips_at_once=m.clips_at_once or order.micro_batch,
        precision=precision,
        teacher=Teacher(encoder, config.teacher.weight, config.teacher.decay) if config.method in TAUGHT else None,
        every=config.regularizer.every,
    )


def apart(source: PretrainedCLIP) -> PretrainedCLIP:
    """The same CLIP with weights of its own, on the CPU until it is used: those of the other will be in shards."""
    return replace(source, clip=copy.deepcopy(source.clip).cpu())


def on_device(micro_batches: Iterable[MicroBatch], normalisation: Normalisation) -> Iterator[MicroBatch]:
    """Clips travel as bytes, and become the numbers that the encoder takes on the device that computes with them.

    On a GPU the bytes of the next micro-batch are on their way while the model is at work on one.
    """
    device = distributed.device()
    on_gpu = device.type == "cuda"

    def sent(batch: MicroBatch) -> MicroBatch:
        clips = batch.clips.pin_memory() if on_gpu else batch.clips
        return batch._replace(clips=clips.to(device, non_blocking=True), labels=batch.labels.to(device))

    ahead: deque[MicroBatch] = deque()
    for batch in map(sent, micro_batches):
        ahead.append(batch)
        if len(ahead) > on_gpu:
            batch = ahead.popleft()
            yield batch._replace(clips=normalised(batch.clips, normalisation))
    for batch in ahead:
        yield batch._replace(clips=normalised(batch.clips, normalisation))


def evaluated_in_training(protocols: Sequence[Protocol], e: InTrainingConfig) -> list[Protocol]:
    """The closed set and the one that is held out, of what the run is evaluated on; none if only the end is."""
    held_out = [p for p in protocols if p.name == e.held_out]
    closed = [p for p in protocols if p.closed and p.name != e.held_out][:1]
    names = ", ".join(p.name for p in protocols)
    if e.held_out is not None and not held_out:
        raise ValueError(
            f"--in-training.held-out: there is no set or protocol {e.held_out}; --data.test and --evaluation.protocols "
            f"have {names or 'none'}."
        )
    if not e.every_epochs:
        return []
    for name, found in (("held-out", held_out), ("closed", closed)):
        if e.best_by == name and not found:
            raise ValueError(f"--in-training.best-by {name}: there is no such set among {names or 'none'}.")
    if not closed + held_out:
        raise ValueError(
            "--in-training.every-epochs: there is nothing to evaluate on: no set has the classes of training, and "
            f"--in-training.held-out names none of {names or 'none'}."
        )
    return closed + held_out


def evaluating(
    evaluation: Evaluation, anchor: Weights, config: Config, steps_per_epoch: int, folder: Path
) -> Evaluating:
    """Evaluation while training goes on; its logits are kept only until it has ended."""

    def accuracies(theta: dict[str, Tensor], advance: Callable[[], object]) -> Accuracies:
        found = evaluation(anchor, theta, folder, advance=advance)

        def conclude() -> Accuracies:
            shutil.rmtree(folder)
            return {result.protocol: {name: result.mean_std(name)[0] for name in result.accuracy} for result in found}

        return distributed.on_first(conclude)

    kinds = {"closed": evaluation.protocols[:1], "held-out": evaluation.protocols[-1:], "mean": evaluation.protocols}
    best_by = tuple(protocol.name for protocol in kinds[config.in_training.best_by])
    every_steps = config.in_training.every_epochs * steps_per_epoch
    return Evaluating(every_steps, accuracies, config.evaluation.anchor_weight, best_by)


def regularizer(method: Method, model: nn.Module, config: Config) -> InterpolatedWeightRegularizer | L2Penalty:
    """What keeps the weights near the anchor while training."""
    if method in IWR:
        r = config.regularizer
        return InterpolatedWeightRegularizer(model, r.max_alpha, r.strength, passes=r.passes, seed=config.seed)
    return L2Penalty(model, strength=1.0 if method == "l2" else 0.0)


def averager(
    method: Method, model: nn.Module, config: Config, steps_per_epoch: int | None = None
) -> SWAAverager | None:
    """The mean of the weights, for methods that have one.

    Args:
        method: Says whether to average.
        model: What is trained.
        config: When to average.
        steps_per_epoch: None for an averager that takes no snapshots, but goes on from those of another.
    """
    if method in ("fine-tuning", "iwr"):
        return None
    if steps_per_epoch is None:
        return SWAAverager(model)
    a, epochs = config.averager, config.optimization.epochs
    start, cycle = round(a.start_epoch * steps_per_epoch), max(1, steps_per_epoch // a.snapshots_per_epoch)
    if start + cycle > epochs * steps_per_epoch:
        raise ValueError(
            f"--averager.start-epoch: {a.start_epoch:g} leaves nothing to average: the first snapshot would be after "
            f"step {start + cycle}, and --optimization.epochs {epochs} has {epochs * steps_per_epoch} steps."
        )
    return SWAAverager(model, start_step=start, cycle_steps=cycle)
