"""The embeddings of many videos, in a file to search in.

$ openvclip features videos/ -o features.safetensors --run runs/…
$ torchrun --nproc-per-node 8 -m -- applications.openvclip features videos/ -o features.parquet --run runs/…

Without the --, torchrun takes --run for an option of its own that is cut short. What was interrupted goes on when its
command is given again. Exit codes: 0 done, 1 a video could not be read, 2 bad input.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from applications.openvclip.commands.evaluate import with_processes
from applications.openvclip.commands.model_options import FLAGS, ModelOptions, notice
from applications.openvclip.config import to_dict


@dataclass(frozen=True)
class Extract:
    """Which videos, and where to."""

    videos: tyro.conf.Positional[tuple[str, ...]]
    """Files, folders and URLs."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("features.safetensors")
    """A .safetensors file, or .parquet."""
    of: Annotated[ModelOptions, tyro.conf.arg(name="")] = field(default_factory=ModelOptions)
    batch_size: int = 16
    """Videos at a time."""
    workers: int = 2
    """Processes that decode videos."""
    time_limit_s: float = 60.0
    """Seconds that reading one video may take."""


def main(arguments: Sequence[str] | None = None) -> None:
    options = tyro.cli(Extract, prog="openvclip features", description=__doc__, args=arguments, config=(FLAGS,))
    unreadable: list[str] = []
    with_processes(lambda: unreadable.extend(extract(options)))
    if unreadable:
        sys.exit(1)


def extract(options: Extract) -> list[str]:
    """Extract, and return what could not be read."""
    from rich.console import Console

    from applications.openvclip import distributed
    from applications.openvclip.inference import features
    from applications.openvclip.inference.many import find_videos, whole
    from applications.openvclip.progress import progress_bar

    if options.output.suffix not in (".safetensors", ".parquet"):
        raise ValueError(f"--output: a .safetensors or .parquet file is expected, got {options.output}.")
    if options.batch_size < 1:
        raise ValueError(f"--batch-size: must be at least 1, got {options.batch_size}.")
    videos = [whole(video) for video in find_videos(options.videos)]
    classifier = options.of.classifier()
    console = Console(quiet=distributed.rank() > 0)
    if told := notice(classifier):
        console.print(told, soft_wrap=True, highlight=False, markup=False)
    with progress_bar(console) as progress:
        task = progress.add_task("looking", total=len(videos))
        found = features.extract(
            classifier,
            videos,
            features.parts_of(options.output),
            workers=options.workers,
            time_limit_s=options.time_limit_s,
            batch_size=options.batch_size,
            advance=lambda n: progress.advance(task, n),
        )
    if found is None:
        return []
    embeddings, unreadable = found
    readable = [i for i, video in enumerate(videos) if video not in unreadable]
    if not readable:
        raise ValueError(f"none of the {len(videos)} videos could be read: {next(iter(unreadable.values()))}")
    made = {
        "model": to_dict(options.of.found_from_anywhere()) | {"anchor_weight": classifier.anchor_weight},
        "weights": features.of_weights(classifier),
        "sampling": classifier.loaded.sampling.as_dict(),
        "unreadable": unreadable,
    }
    kept = features.Features(tuple(videos[i] for i in readable), embeddings[readable], made)
    features.write_features(options.output, kept)
    features.remove_parts(options.output)
    for reason in unreadable.values():
        console.print(f"unreadable: {reason}", style="red", soft_wrap=True, markup=False, highlight=False)
    console.print(f"features of {len(readable)} videos: {options.output}", soft_wrap=True, highlight=False)
    return list(unreadable)
