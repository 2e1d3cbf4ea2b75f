"""Look at a data set before using it.

$ openvclip inspect /data/UCF-101
$ openvclip inspect lists/ucf101_split1/test.csv --root /data/UCF-101 --write split1.csv
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import tyro


def main(arguments: Sequence[str] | None = None) -> None:
    tyro.cli(inspect, prog="openvclip inspect", description=__doc__, args=arguments)


def inspect(
    source: tyro.conf.Positional[str],
    root: str | None = None,
    names: str | None = None,
    write: Path | None = None,
    workers: int = 2,
    time_limit_s: float = 60.0,
) -> None:
    """Count videos and classes, open every video, and say which can't be read.

    Args:
        source: Folder of class folders, or a list in any of the known layouts; a path or URL. Or miniature:train.
        root: Where the videos are that a list names; by default the list's folder.
        names: JSON file of class names to use instead of the tidied ones.
        write: Where to write a manifest (CSV of path, label) of the readable videos.
        workers: Processes that open videos.
        time_limit_s: Seconds that a video may take.
    """
    from rich.console import Console

    from applications.openvclip import build
    from applications.openvclip.data import inspection
    from applications.openvclip.data.manifest import write_manifest
    from applications.openvclip.data.storage import Cache
    from applications.openvclip.progress import progress_bar

    console = Console()
    manifest = build.data_set(source, root, names)
    for line in manifest.lines():
        console.print(line, soft_wrap=True, markup=False, highlight=False)
    with progress_bar(console) as progress:
        task = progress.add_task("opening videos", total=len(manifest))
        found = inspection.inspect(
            manifest,
            workers=workers,
            time_limit_s=time_limit_s,
            cache=Cache(),
            advance=lambda: progress.advance(task),
        )
    for line in found.lines():
        console.print(line, soft_wrap=True, markup=False, highlight=False)
    if write:
        write_manifest(write, manifest.only(found.streams))
        console.print(f"manifest of the {len(found.streams)} readable videos: {write}", soft_wrap=True)
