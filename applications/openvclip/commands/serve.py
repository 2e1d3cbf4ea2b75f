"""A live page on this machine: drop a video, type labels, and move the anchor weight.

$ openvclip serve                              # the newest run here; without one, the built-in miniature
$ openvclip serve --run runs/vit_b_16-… --labels "archery,juggling balls"

It answers on 127.0.0.1 only and asks nothing of any other machine. Uploads are limited and deleted. Needs the extra
`demo`: pip install '.[openvclip,demo]' in a clone of the repository.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import tyro

from applications.openvclip.commands.model_options import ModelOptions, notice


@dataclass(frozen=True)
class Serve:
    """What to show, and what to take."""

    of: Annotated[ModelOptions, tyro.conf.arg(name="")] = field(default_factory=ModelOptions)
    labels: str | None = None
    """Labels to begin with, parted by commas, or a file of them; by default some of the model's."""
    port: int | None = None
    """Of 127.0.0.1; by default one that is free, from 7860 on."""
    max_mb: float = 100
    """Megabytes that an upload may have."""
    max_minutes: float = 5
    """Length that a video may have."""
    workers: int = 2
    """Processes that decode videos."""
    time_limit_s: float = 30
    """Seconds that reading one video may take."""


def main(arguments: Sequence[str] | None = None) -> None:
    serve(tyro.cli(Serve, prog="openvclip serve", description=__doc__, args=arguments))


def serve(options: Serve) -> None:
    """Serve until interrupted."""
    import signal
    from threading import Event

    from rich.console import Console

    from applications.openvclip.data.workers import Workers
    from applications.openvclip.inference.labels import read_labels
    from applications.openvclip.page.uploads import UploadReader

    try:
        from applications.openvclip.page.app import Page
        from applications.openvclip.page.content import content_of
        from applications.openvclip.page.server import serving
    except ModuleNotFoundError as error:
        raise RuntimeError(
            f"the page needs {error.name}, which is not installed: pip install '.[openvclip,demo]'."
        ) from error

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what was sent is deleted however it is ended
    console = Console()
    of = options.of
    if of == ModelOptions() and (newest := newest_run(Path("runs"))):
        of = replace(of, run=str(newest))
    classifier = of.classifier()
    labels = read_labels(options.labels) if options.labels else None
    with Workers(UploadReader(classifier.views, options.max_minutes), options.workers, options.time_limit_s) as pool:
        page = Page(classifier, pool, content_of(classifier, pool, of.run or of.weights, labels))
        with serving(page, port=options.port, max_mb=options.max_mb) as address:
            told = notice(classifier)
            for line in (*([told] if told else []), f"serving {page.content.about}", f"{address} (Ctrl-C ends it)"):
                console.print(line, soft_wrap=True, highlight=False, markup=False)
            Event().wait()


def newest_run(folder: Path) -> Path | None:
    """The latest finished run in a folder."""
    from applications.openvclip.runs.folder import RunFolder

    runs = [RunFolder(path) for path in folder.glob("*")]
    finished = [run for run in runs if run.config.exists() and run.averaged.exists() and run.results.exists()]
    return max(finished, key=lambda run: run.results.stat().st_mtime).path if finished else None
