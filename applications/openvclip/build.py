"""From a configuration to what every command is made of: a CLIP, data sets, protocols, an evaluation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import replace

from torch import Tensor

from applications.openvclip import distributed
from applications.openvclip.config import (
    Config,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
)
from applications.openvclip.data import layouts
from applications.openvclip.data.manifest import Manifest
from applications.openvclip.data.storage import Cache
from applications.openvclip.data.transforms import Normalisation
from applications.openvclip.miniature import tasks, tiny_clip
from applications.openvclip.model.clip import PretrainedCLIP
from applications.openvclip.model.precision import Precision
from applications.openvclip.model.prompts import TEMPLATES
from applications.openvclip.model.video_encoder import VideoEncoder
from applications.openvclip.zeroshot.evaluation import Evaluation, embedded
from applications.openvclip.zeroshot.one_pass import Reading
from applications.openvclip.zeroshot.protocols import Protocol, Sources, named
from interpolate.weights import trainable_weights


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
    """The CLIP to start from, on the GPU where there is one.

    Raises:
        ValueError: Its weights are those of a video model with other edges.
    """
    if model.name == "miniature":
        return tiny_clip.load_pretrained(distributed.device())
    from applications.openvclip.model import pretrained  # with open_clip, whose imports take seconds

    found = pretrained.load(model.name, model.pretrained, distributed.device())
    if found.is_of_video and model.edge != "zero":
        raise ValueError(
            f"--model.pretrained {model.pretrained} is a checkpoint of the published code, trained with zeros beyond a "
            f"clip's edges, and --model.edge is {model.edge}: give --model.edge zero to train on from it; or, to use "
            "it, give it as --weights, and as --model.pretrained what it was trained from, such as openai."
        )
    return found


def anchor(source: PretrainedCLIP) -> dict[str, Tensor]:
    """A copy of the weights that are fine-tuned, on the CPU."""
    return {name: p.detach().to("cpu", copy=True) for name, p in trainable_weights(VideoEncoder(source.clip)).items()}


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
    return Cache(max_bytes=round(data.cache_gb * 1e9), decoded=data.decoded)
