"""A run from its configuration: what is trained, on what, and how it is evaluated."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from applications.openvclip import checkpoint, distributed
from applications.openvclip.config import Config, Method, to_dict
from applications.openvclip.data import layouts
from applications.openvclip.data.dataset import TrainingClips
from applications.openvclip.data.loader import TrainingOrder, training_batches
from applications.openvclip.data.manifest import Manifest
from applications.openvclip.data.sampling import Sampling
from applications.openvclip.data.storage import Cache
from applications.openvclip.data.transforms import Augmentation, Normalisation
from applications.openvclip.journal import Journal, provenance
from applications.openvclip.l2_penalty import L2Penalty
from applications.openvclip.miniature import tasks, tiny_clip
from applications.openvclip.model import pretrained
from applications.openvclip.model.classifier import class_embeddings
from applications.openvclip.model.pretrained import PretrainedCLIP
from applications.openvclip.model.prompts import TEMPLATES
from applications.openvclip.model.video_encoder import VideoEncoder
from applications.openvclip.progress import progress_bar
from applications.openvclip.run_folder import RunFolder, open_for_training
from applications.openvclip.trainer import LearningRate, Trainer, adamw
from applications.openvclip.zeroshot import report
from applications.openvclip.zeroshot.evaluator import Reading, Scorer, at_weights, look, plan
from applications.openvclip.zeroshot.protocols import Protocol, Sources, named
from applications.openvclip.zeroshot.report import BASELINE, ProtocolResult
from interpolate import InterpolatedWeightRegularizer, SWAAverager, WeightMismatchError, patch
from interpolate.weights import Weights, trainable_weights

console = Console()


def train(config: Config) -> RunFolder:
    """Fine-tune, average, patch and evaluate; an unfinished run in the same folder is continued."""
    source = load_clip(config)
    training_set = training_manifest(config)
    protocols = protocols_of(config, training_set)
    folder = open_for_training(config)
    console.print(f"run: {folder.path}", soft_wrap=True)
    journal = Journal(folder.journal)
    journal.write("start", **provenance(), config=to_dict(config))
    torch.manual_seed(config.seed)

    model = VideoEncoder(source.clip, edge=config.model.edge)
    anchor = {name: p.detach().clone() for name, p in trainable_weights(model).items()}
    theta = fine_tune(config, source, model, training_set, folder, journal)
    metadata = {"anchor": fingerprint(anchor), "seed": str(config.seed)}
    checkpoint.save_weights(folder.averaged, theta, metadata | {"content": "mean of the fine-tuned weights"})
    weight = config.evaluation.anchor_weight
    patched = patch(anchor, theta, anchor_weight=weight)
    checkpoint.save_weights(folder.patched, patched, metadata | {"content": f"patched, anchor weight {weight:g}"})

    show(config, folder, evaluate(config, source, anchor, theta, protocols, folder))
    journal.write("end")
    return folder


def reevaluate(folder: RunFolder, changes: dict[str, object]) -> None:
    """Evaluate a run's averaged weights again, with other fields of `EvaluationConfig`; its report is written anew.

    Raises:
        FileNotFoundError: There is no run, or it has no averaged weights yet.
        WeightMismatchError: The pretrained weights are not those that the run started from.
    """
    config = folder.read_config()
    if not folder.averaged.exists():
        raise FileNotFoundError(f"{folder.path} has no {folder.averaged.name}: its training has not ended.")
    config = replace(config, evaluation=replace(config.evaluation, **changes))
    source = load_clip(config)
    anchor = trainable_weights(VideoEncoder(source.clip, edge=config.model.edge))
    theta, metadata = checkpoint.load_weights(folder.averaged)
    if metadata["anchor"] != fingerprint(anchor):
        raise WeightMismatchError(
            f"{folder.averaged} was trained from other pretrained weights than {config.model.name} "
            f"{config.model.pretrained or ''} holds now (fingerprint {metadata['anchor']}, now {fingerprint(anchor)})."
        )
    protocols = protocols_of(config, training_manifest(config))
    show(config, folder, evaluate(config, source, anchor, theta, protocols, folder))


def evaluate_weights(config: Config, weights: Path | None, folder: RunFolder) -> None:
    """Evaluate weights that no run of this program made; without any, CLIP* alone.

    Args:
        config: What to evaluate with; `config.model` is the anchor.
        weights: Fine-tuned weights in one of the forms of `pretrained.read_file`.
        folder: Where logits and results go.
    """
    source = load_clip(config)
    theta = None
    if weights is not None:
        theta, form = pretrained.read_file(weights)
        if form == "Open-VCLIP" and config.model.edge != "zero":
            config = replace(config, model=replace(config.model, edge="zero"))
            console.print(f"{weights} is a checkpoint of the published code: evaluated with edge=zero.", soft_wrap=True)
    anchor = trainable_weights(VideoEncoder(source.clip, edge=config.model.edge))
    if theta is not None:
        theta = {name: tensor for name, tensor in theta.items() if name.startswith("visual.") or name == "logit_scale"}
    folder.path.mkdir(parents=True, exist_ok=True)
    show(config, folder, evaluate(config, source, anchor, theta, protocols_of(config, None), folder))


def load_clip(config: Config) -> PretrainedCLIP:
    """The CLIP that the run starts from, on the GPU where there is one."""
    if config.model.name == "miniature":
        return tiny_clip.load_pretrained(distributed.device())
    return pretrained.load(config.model.name, config.model.pretrained, distributed.device())


def training_manifest(config: Config) -> Manifest:
    """The set to train on."""
    d = config.data
    if d.train:
        return layouts.read_dataset(d.train, d.train_root, d.train_names)
    if config.model.name != "miniature":
        raise ValueError(f"data.train: {config.model.name} needs videos to train on, a folder or a list of them.")
    return tasks.prepare(config.seed, console=console)["train"]


def protocols_of(config: Config, training_set: Manifest | None) -> list[Protocol]:
    """What to evaluate on: sets of one's own, published protocols, or else the sets of the miniature."""
    e = config.evaluation
    manifests = [layouts.read_dataset(test) for test in config.data.test]
    if not manifests and not e.protocols and config.model.name == "miniature":
        builtin = tasks.prepare(config.seed, console=console)
        manifests = [builtin[name] for name in tasks.TEST_SETS]
    own = [
        Protocol(
            manifest.name,
            (manifest,),
            TEMPLATES[config.data.templates],
            sampling(config),
            unreadable=e.unreadable,
            closed=training_set is not None and set(manifest.classes) == set(training_set.classes),
        )
        for manifest in manifests
    ]
    sources = {name: Sources(root, e.lists.get(name), config.seed) for name, root in e.videos.items()}
    return own + [named(name, sources, e.unreadable) for name in e.protocols]


def sampling(config: Config) -> Sampling:
    d, e = config.data, config.evaluation
    return Sampling(d.frames, d.stride, d.target_fps, d.sampler, e.views, e.crops)


def cache(config: Config) -> Cache:
    return Cache(max_bytes=round(config.data.cache_gb * 1e9))


def regularizer_of(method: Method, model: VideoEncoder, config: Config) -> InterpolatedWeightRegularizer | L2Penalty:
    """What keeps the weights near the anchor while training."""
    if method in ("open-vclip", "iwr"):
        r = config.regularizer
        return InterpolatedWeightRegularizer(model, r.max_alpha, r.strength, seed=config.seed)
    return L2Penalty(model, strength=1.0 if method == "l2" else 0.0)


def averager_of(method: Method, model: VideoEncoder, config: Config, steps_per_epoch: int) -> SWAAverager:
    """The mean of the weights; without averaging, of the last weights alone."""
    if method in ("fine-tuning", "iwr"):
        return SWAAverager(model, start_step=config.optimization.epochs * steps_per_epoch - 1)
    return SWAAverager(
        model,
        start_step=round(config.averager.start_epoch * steps_per_epoch),
        cycle_steps=max(1, steps_per_epoch // config.averager.snapshots_per_epoch),
    )


def fine_tune(
    config: Config,
    source: PretrainedCLIP,
    model: VideoEncoder,
    training_set: Manifest,
    folder: RunFolder,
    journal: Journal,
) -> dict[str, Tensor]:
    """Train the model by the configured method; returns the mean of its weights."""
    o, d = config.optimization, config.data
    steps_per_epoch = len(training_set) // o.batch_size
    learning_rate = LearningRate(
        highest=o.learning_rate,
        lowest=o.lowest_learning_rate,
        warmup_steps=round(o.warmup_epochs * steps_per_epoch),
        total_steps=o.epochs * steps_per_epoch,
        schedule=o.schedule,
    )
    trainer = Trainer(
        model,
        class_embeddings=class_embeddings(source.clip, source.tokenizer, training_set.classes, TEMPLATES[d.templates]),
        optimizer=adamw(model, o.weight_decay, o.betas),
        learning_rate=learning_rate,
        regularizer=regularizer_of(config.method, model, config),
        averager=averager_of(config.method, model, config, steps_per_epoch),
        max_gradient_norm=o.max_gradient_norm,
        journal=journal,
    )
    trainer.resume(folder.training_state)
    replaced: dict[str, str] = {}

    def on_unreadable(location: str, reason: str) -> None:
        if location not in replaced:
            journal.write("unreadable", video=location, reason=reason)
        replaced[location] = reason

    batches = training_batches(
        TrainingClips(
            training_set,
            sampling(config),
            source.image_size,
            Augmentation(d.max_short_side, d.horizontal_flip, d.colour_jitter),
            config.seed,
            cache(config),
        ),
        TrainingOrder(len(training_set), o.batch_size, config.seed, trainer.step, learning_rate.total_steps),
        Normalisation(source.image_mean, source.image_std),
        workers=d.workers,
        time_limit_s=d.time_limit_s,
        on_unreadable=on_unreadable,
    )
    trainer.fit(batches, steps_per_epoch=steps_per_epoch, checkpoint=folder.training_state)
    if replaced:
        console.print(
            f"{len(replaced)} videos could not be read and were replaced by others: see {folder.journal}",
            soft_wrap=True,
        )
    return trainer.averager.weights


def evaluate(
    config: Config,
    source: PretrainedCLIP,
    anchor: Weights,
    theta: Weights | None,
    protocols: Sequence[Protocol],
    folder: RunFolder,
) -> list[ProtocolResult]:
    """CLIP* and the weights along the path from theta to the anchor, under every protocol, from one look at each video.

    Processes of torchrun share the videos; all return the same results.
    """
    scorers = scorers_of(config, source, anchor, theta)
    reading = Reading(
        size=source.image_size,
        normalisation=Normalisation(source.image_mean, source.image_std),
        workers=config.data.workers,
        time_limit_s=config.data.time_limit_s,
        batch_size=config.evaluation.batch_size,
        cache=cache(config),
    )
    passes = plan(protocols)
    results: dict[str, ProtocolResult] = {}
    with progress_bar(console) as progress:
        task = progress.add_task("evaluating", total=sum(len(one.videos) for one in passes))
        for one, group in passes.items():
            progress.update(task, description=f"evaluating, {', '.join(p.name for p in group)}")
            embeddings = class_embeddings(source.clip, source.tokenizer, one.classes, one.templates)
            weights = {"classes": embeddings, **{f"anchor {name}": tensor for name, tensor in anchor.items()}}
            weights |= {f"theta {name}": tensor for name, tensor in (theta or {}).items()}
            files = look(
                one,
                scorers,
                embeddings,
                reading,
                folder.logits,
                weights=f"{fingerprint(weights)}, edge {config.model.edge}",
                advance=lambda n: progress.advance(task, n),
            )
            results |= {protocol.name: report.result_of(protocol, one, files) for protocol in group}
    return [results[protocol.name] for protocol in protocols]


def scorers_of(config: Config, source: PretrainedCLIP, anchor: Weights, theta: Weights | None) -> dict[str, Scorer]:
    """CLIP* and, where there are fine-tuned weights, the model at every anchor weight, by name."""
    scorers = {BASELINE: at_weights(VideoEncoder(source.clip, temporal=False).eval(), anchor)}
    if theta is None:
        return scorers
    temporal = VideoEncoder(source.clip, edge=config.model.edge).eval()
    weights = sorted({0.0, *config.evaluation.anchor_weights, config.evaluation.anchor_weight})
    device = distributed.device()
    theta = {name: tensor.to(device) for name, tensor in theta.items()}
    return scorers | {f"{w:g}": at_weights(temporal, patch(anchor, theta, anchor_weight=w)) for w in weights}


def show(config: Config, folder: RunFolder, found: list[ProtocolResult]) -> None:
    """Write results.json, results.md and tradeoff.png, and print the table; one process does."""
    if distributed.rank() > 0:
        return
    results = report.results(config.model.name, config.evaluation.anchor_weight, found, to_dict(config))
    report.write_results(folder.results, results)
    checkpoint.write_text(folder.markdown, report.markdown(results))
    console.print(report.table(results))
    for result in found:
        if result.unreadable:
            policy = "counted as wrong" if result.unreadable_policy == "wrong" else "left out"
            console.print(f"{result.protocol}: {len(result.unreadable)} unreadable videos, {policy}")
    patched = all(f"{config.evaluation.anchor_weight:g}" in result.accuracy for result in found)
    if patched and any(r.closed for r in found) and not all(r.closed for r in found):
        report.plot_tradeoff(folder.plot, results)
        console.print(f"the trade-off along the anchor weight: {folder.plot}", soft_wrap=True)
    console.print(f"all figures: {folder.results}, as tables: {folder.markdown}", soft_wrap=True)


def fingerprint(weights: Weights) -> str:
    """A hash of names and values, to tell one set of weights from another."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(weights[name].detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
