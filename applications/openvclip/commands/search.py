"""Find videos by words or by a video, among those of a file of features.

$ openvclip features videos/ -o features.safetensors
$ openvclip search "a person juggling" --in features.safetensors --html found.html
$ openvclip search clip.mp4 --in features.safetensors
$ openvclip search --captions msrvtt_test.csv --in features.safetensors      # recall at 1, 5 and 10
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import cattrs
import tyro

from applications.openvclip.commands.model_options import FLAGS, ModelOptions, notice

if TYPE_CHECKING:
    from rich.console import Console

    from applications.openvclip.inference.classifier import Classifier
    from applications.openvclip.inference.features import Features


@dataclass(frozen=True)
class Search:
    """What to look for, and where. The model is the one that the features were made with."""

    query: tyro.conf.Positional[str | None] = None
    """Words; or a video, a file or URL."""
    features: Annotated[Path, tyro.conf.arg(name="in")] = Path("features.safetensors")
    """What `openvclip features` wrote."""
    captions: str | None = None
    """Table of videos and their captions, as MSR-VTT's (video_id, sentence): how often each is found by the other."""
    top: int = 10
    """Videos to show."""
    html: Path | None = None
    """Where to write a page of them, with a still of each."""
    json: bool = False
    """Print JSON."""


def main(arguments: Sequence[str] | None = None) -> None:
    search(tyro.cli(Search, prog="openvclip search", description=__doc__, args=arguments, config=(FLAGS,)))


def search(options: Search) -> None:
    from rich.console import Console

    from applications.openvclip.inference.features import read_features

    if (options.query is None) == (options.captions is None):
        raise ValueError("search: words or a video to look for, or --captions FILE; one of them.")
    if options.top < 1:
        raise ValueError(f"--top: must be at least 1, got {options.top}.")
    features = read_features(options.features)
    console = Console(stderr=True)
    classifier = model_of(features, options.features)
    if told := notice(classifier):
        console.print(told, soft_wrap=True, highlight=False, markup=False)
    if options.captions is not None:
        known_captions(classifier, features, options.captions, as_json=options.json)
    else:
        by_query(options, classifier, features, console)


def model_of(features: Features, path: Path) -> Classifier:
    """The model that features were made with.

    Raises:
        ValueError: It is no longer the same; cosines with others mean nothing.
    """
    from applications.openvclip.inference.features import of_weights

    classifier = cattrs.structure(features.made["model"], ModelOptions).classifier()
    now = of_weights(classifier)
    if now != features.made["weights"]:
        raise ValueError(
            f"{path}: its features were made with other weights than {features.made['model']} holds now (fingerprint "
            f"{features.made['weights']}, now {now}); extract them again."
        )
    return classifier


def by_query(options: Search, classifier: Classifier, features: Features, told: Console) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from applications.openvclip.data import storage
    from applications.openvclip.data.decode import VideoReadError
    from applications.openvclip.data.workers import Workers
    from applications.openvclip.inference.many import is_video
    from applications.openvclip.inference.search import Still, best, write_page

    query = options.query or ""
    if is_video(query) or storage.is_url(query):
        vector = classifier.features(query)
    else:
        classifier.templates = ("{}",)  # the words as they are, not the name of a class
        (vector,) = classifier.embeddings_of([query])
    found = best(vector, features, options.top)
    if options.json:
        print(json.dumps({"query": query, "found": [{"video": v, "cosine": c} for v, c in found]}, ensure_ascii=False))
    else:
        table = Table(box=None, header_style="bold", pad_edge=False)
        table.add_column("cosine", justify="right")
        table.add_column("video", overflow="fold")
        for video, cosine in found:
            table.add_row(f"{cosine:.3f}", Text(video))
        Console().print(table)
    if options.html is not None:
        with Workers(Still(classifier.views.cache), 2, 60.0) as pool:
            read = list(pool.map(video for video, _ in found))
        stills = [str(still) if isinstance(still, VideoReadError) else still for still in read]
        write_page(options.html, query, found, dict(zip((video for video, _ in found), stills, strict=True)))
        told.print(f"page: {options.html}", soft_wrap=True, highlight=False, markup=False)


def known_captions(classifier: Classifier, features: Features, source: str, *, as_json: bool) -> None:
    import torch
    from rich.console import Console
    from rich.table import Table

    from applications.openvclip.inference.search import read_captions, recall, videos_of

    captions = read_captions(source)
    rows = videos_of(captions, features)
    classifier.templates = ("{}",)
    texts = list(dict.fromkeys(caption.text for caption in captions))
    of = dict(zip(texts, classifier.embeddings_of(texts).cpu(), strict=True))
    found = recall(torch.stack([of[caption.text] for caption in captions]), rows, features)
    if as_json:
        print(json.dumps({"captions": len(captions), "videos": len(set(rows)), **found}, ensure_ascii=False))
        return
    table = Table("", *next(iter(found.values())), box=None, header_style="bold")
    table.title = f"{len(captions)} captions of {len(set(rows))} videos"
    for direction, figures in found.items():
        *recalls, rank = figures.values()
        table.add_row(direction, *(f"{100 * value:.1f} %" for value in recalls), f"{rank:g}")
    Console().print(table)
