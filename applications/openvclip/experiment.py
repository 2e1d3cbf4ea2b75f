"""A run from its configuration: what is trained, on what, and how it is evaluated."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import torch
from rich.console import Console
from torch import Tensor

from applications.openvclip import checkpoint, metrics
from applications.openvclip.config import Config, to_dict
from applications.openvclip.data.dataset import ClipFormat, EvaluationViews, TrainingClips
from applications.openvclip.data.loader import TrainingOrder, evaluation_loader, training_loader
from applications.openvclip.data.manifest import Manifest, read_manifest
from applications.openvclip.data.transforms import Augmentation, Normalisation
from applications.openvclip.journal import Journal, provenance
from applications.openvclip.miniature import tasks, tiny_clip
from applications.openvclip.model import pretrained
from applications.openvclip.model.classifier import class_embeddings
from applications.openvclip.model.pretrained import PretrainedCLIP
from applications.openvclip.model.prompts import TEMPLATES
from applications.openvclip.model.video_encoder import VideoEncoder
from applications.openvclip.progress import progress_bar
from applications.openvclip.run_folder import RunFolder, open_for_training
from applications.openvclip.trainer import LearningRate, Trainer, adamw
from applications.openvclip.zeroshot.evaluator import at_weights, score
from applications.openvclip.zeroshot.report import BASELINE, SetResult, plot_tradeoff, table, write_results
from interpolate import InterpolatedWeightRegularizer, SWAAverager, WeightMismatchError, patch
from interpolate.weights import Weights, trainable_weights

console = Console()


def train(config: Config) -> RunFolder:
    """Fine-tune, average, patch and evaluate; an unfinished run in the same folder is continued."""
    folder = open_for_training(config)
    console.print(f"run: {folder.path}")
    journal = Journal(folder.journal)
    journal.write("start", **provenance(), config=to_dict(config))
    torch.manual_seed(config.seed)

    source = load_clip(config)
    training_set, test_sets = manifests(config)
    model = VideoEncoder(source.clip, edge=config.model.edge)
    anchor = {name: p.detach().clone() for name, p in trainable_weights(model).items()}
    theta = fine_tune(config, source, model, training_set, folder, journal)
    metadata = {"anchor": fingerprint(anchor), "seed": str(config.seed)}
    checkpoint.save_weights(folder.averaged, theta, metadata | {"content": "mean of the fine-tuned weights"})
    weight = config.evaluation.anchor_weight
    patched = patch(anchor, theta, anchor_weight=weight)
    checkpoint.save_weights(folder.patched, patched, metadata | {"content": f"patched, anchor weight {weight:g}"})

    report(config, folder, evaluate(config, source, anchor, theta, training_set.classes, test_sets))
    journal.write("end")
    return folder


def reevaluate(folder: RunFolder, anchor_weights: Sequence[float] | None = None) -> None:
    """Evaluate a run's averaged weights again, at other anchor weights if asked; its report is written anew.

    Raises:
        FileNotFoundError: There is no run, or it has no averaged weights yet.
        WeightMismatchError: The pretrained weights are not those that the run started from.
    """
    config = folder.read_config()
    if not folder.averaged.exists():
        raise FileNotFoundError(f"{folder.path} has no {folder.averaged.name}: its training has not ended.")
    if anchor_weights:
        evaluation = replace(config.evaluation, anchor_weights=tuple(anchor_weights))
        config = replace(config, evaluation=evaluation)
    source = load_clip(config)
    anchor = trainable_weights(VideoEncoder(source.clip, edge=config.model.edge))
    theta, metadata = checkpoint.load_weights(folder.averaged)
    if metadata["anchor"] != fingerprint(anchor):
        raise WeightMismatchError(
            f"{folder.averaged} was trained from other pretrained weights than {config.model.name} "
            f"{config.model.pretrained or ''} holds now (fingerprint {metadata['anchor']}, now {fingerprint(anchor)})."
        )
    training_set, test_sets = manifests(config)
    report(config, folder, evaluate(config, source, anchor, theta, training_set.classes, test_sets))


def load_clip(config: Config) -> PretrainedCLIP:
    """The CLIP that the run starts from, on the GPU where there is one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if config.model.name == "miniature":
        return tiny_clip.load_pretrained(device)
    return pretrained.load(config.model.name, config.model.pretrained, device)


def manifests(config: Config) -> tuple[Manifest, list[Manifest]]:
    """The set to train on and those to test on."""
    builtin = {} if config.data.train and config.data.test else tasks.prepare(config.seed, console=console)
    training_set = read_manifest(config.data.train) if config.data.train else builtin["train"]
    test_sets = [read_manifest(path) for path in config.data.test] or [builtin[name] for name in tasks.TEST_SETS]
    return training_set, test_sets


def clip_format(config: Config, source: PretrainedCLIP) -> ClipFormat:
    return ClipFormat(
        frames=config.data.frames,
        stride=config.data.stride,
        target_fps=config.data.target_fps,
        size=source.image_size,
        normalisation=Normalisation(source.image_mean, source.image_std),
    )


def fine_tune(
    config: Config,
    source: PretrainedCLIP,
    model: VideoEncoder,
    training_set: Manifest,
    folder: RunFolder,
    journal: Journal,
) -> dict[str, Tensor]:
    """Train the model with interpolated weight optimization; returns the mean of its weights."""
    o = config.optimization
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
        class_embeddings=class_embeddings(
            source.clip, source.tokenizer, training_set.classes, TEMPLATES[config.data.templates]
        ),
        optimizer=adamw(model, o.weight_decay, o.betas),
        learning_rate=learning_rate,
        regularizer=InterpolatedWeightRegularizer(
            model, config.regularizer.max_alpha, config.regularizer.strength, seed=config.seed
        ),
        averager=SWAAverager(
            model,
            start_step=round(config.averager.start_epoch * steps_per_epoch),
            cycle_steps=max(1, steps_per_epoch // config.averager.snapshots_per_epoch),
        ),
        max_gradient_norm=o.max_gradient_norm,
        journal=journal,
    )
    trainer.resume(folder.training_state)
    augmentation = Augmentation(config.data.max_short_side, config.data.horizontal_flip, config.data.colour_jitter)
    clips = TrainingClips(training_set, clip_format(config, source), augmentation, config.seed)
    order = TrainingOrder(len(training_set), o.batch_size, config.seed, trainer.step, learning_rate.total_steps)
    trainer.fit(
        training_loader(clips, order, config.data.workers),
        steps_per_epoch=steps_per_epoch,
        checkpoint=folder.training_state,
    )
    return trainer.averager.weights


def evaluate(
    config: Config,
    source: PretrainedCLIP,
    anchor: Weights,
    theta: Weights,
    training_classes: Sequence[str],
    test_sets: Sequence[Manifest],
) -> list[SetResult]:
    """Top-1 of CLIP* and of the weights along the path from theta to the anchor, on every test set."""
    e = config.evaluation
    temporal = VideoEncoder(source.clip, edge=config.model.edge).eval()
    frame_wise = VideoEncoder(source.clip, temporal=False).eval()
    path = {
        weight: patch(anchor, theta, anchor_weight=weight)
        for weight in sorted({0.0, *e.anchor_weights, e.anchor_weight})
    }
    scorers = {BASELINE: at_weights(frame_wise, anchor)}
    scorers |= {f"{weight:g}": at_weights(temporal, weights) for weight, weights in path.items()}

    results = []
    with progress_bar(console) as progress:
        task = progress.add_task("evaluating", total=sum(map(len, test_sets)))
        for test_set in test_sets:
            progress.update(task, description=f"evaluating, {test_set.name}")
            classes = class_embeddings(
                source.clip, source.tokenizer, test_set.classes, TEMPLATES[config.data.templates]
            )
            views = EvaluationViews(test_set, clip_format(config, source), e.views)
            batches = evaluation_loader(views, e.batch_size, config.data.workers)
            logits, labels = score(scorers, batches, classes, advance=lambda n: progress.advance(task, n))
            top1 = {name: metrics.top_k_accuracy(values, labels) for name, values in logits.items()}
            results.append(
                SetResult(
                    protocol=test_set.name,
                    closed=set(test_set.classes) == set(training_classes),
                    videos=len(test_set),
                    classes=len(test_set.classes),
                    views=e.views,
                    templates=config.data.templates,
                    baseline=top1[BASELINE],
                    along_path={weight: top1[f"{weight:g}"] for weight in path},
                )
            )
    return results


def report(config: Config, folder: RunFolder, results: list[SetResult]) -> None:
    """Write results.json and tradeoff.png, and print the table."""
    anchor_weight = config.evaluation.anchor_weight
    write_results(folder.results, results, anchor_weight=anchor_weight, config=to_dict(config))
    console.print(table(results, anchor_weight))
    if any(result.closed for result in results) and not all(result.closed for result in results):
        plot_tradeoff(folder.plot, results, anchor_weight)
        console.print(f"the trade-off along the anchor weight: {folder.plot}")
    console.print(f"all figures: {folder.results}")


def fingerprint(weights: Weights) -> str:
    """A hash of names and values, to tell one set of weights from another."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(weights[name].detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
