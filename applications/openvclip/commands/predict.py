"""What videos show, among labels of your own.

$ openvclip predict clip.mp4 --labels "archery,juggling balls" --run runs/miniature-…
$ openvclip predict videos/ https://example.org/clip.mp4 --labels labels.txt --csv > found.csv
$ openvclip predict long.mp4 --labels labels.txt --window 2s --step 1s
$ openvclip predict clip.mp4 --labels archery --model.name ViT-B-16 --model.pretrained openai

Labels are a text, where commas part classes and | parts the names of one; or a file, with a class a line or as JSON.
Exit codes: 0 done, 1 a video could not be read, 2 bad input.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from applications.openvclip.commands.model_options import FLAGS, ModelOptions, notice

if TYPE_CHECKING:
    from rich.console import Console

    from applications.openvclip.inference.classifier import Classifier


@dataclass(frozen=True)
class Predict:
    """What to look at, and for what."""

    videos: tyro.conf.Positional[tuple[str, ...]]
    """Files, folders and URLs."""
    labels: str
    """Classes, parted by commas, or a file of them."""
    of: Annotated[ModelOptions, tyro.conf.arg(name="")] = field(default_factory=ModelOptions)
    none_of_these: bool = False
    """Whether a video may show none of the labels; it takes a run that `openvclip calibrate` has seen."""
    multi_label: bool = False
    """Whether a video may show several labels, each with a probability of its own; it takes such a run, too."""
    window: str | None = None
    """Look along the time of one long video, at windows of this length, such as 2s."""
    step: str | None = None
    """Time from one window to the next; by default half of a window."""
    timeline: Path = Path("timeline.png")
    """Where the picture of a video along its time goes."""
    top: int = 5
    """Labels of each video in the table."""
    json: bool = False
    """Print JSON, with every label."""
    csv: bool = False
    """Print CSV, a line for each video and label."""
    workers: int = 2
    """Processes that decode videos."""
    time_limit_s: float = 60.0
    """Seconds that reading one video may take."""

    def durations(self) -> tuple[float, float]:
        """Of a window and a step, in seconds; 0 where there are no windows."""
        from applications.openvclip.inference.windows import seconds

        if self.window is None:
            if self.step is not None:
                raise ValueError(f"--step {self.step} is the time between windows; it needs --window.")
            return 0.0, 0.0
        window = seconds(self.window, "--window")
        return window, window / 2 if self.step is None else seconds(self.step, "--step")


def main(arguments: Sequence[str] | None = None) -> None:
    options = tyro.cli(Predict, prog="openvclip predict", description=__doc__, args=arguments, config=(FLAGS,))
    if not predict(options):
        sys.exit(1)


def predict(options: Predict) -> bool:
    """Print what was found; whether every video could be read."""
    from rich.console import Console

    from applications.openvclip.data.workers import start_early
    from applications.openvclip.inference.labels import read_labels
    from applications.openvclip.inference.many import find_videos

    if options.json and options.csv:
        raise ValueError("--json and --csv: one of them, both go to the standard output.")
    if options.top < 1:
        raise ValueError(f"--top: must be at least 1, got {options.top}.")
    if options.multi_label and options.window is not None:
        raise ValueError("--multi-label and --window: along its time a video shows one label at a time; give one.")
    labels = read_labels(options.labels)
    videos = find_videos(options.videos)
    if options.window is not None and len(videos) > 1:
        raise ValueError(f"--window: one video at a time, got {len(videos)}.")
    window, step = options.durations()
    start_early("applications.openvclip.data.views")  # beside the imports and weights of this process
    classifier = options.of.classifier()
    # a mistake is found before the first video
    classifier.answers(labels, none_of_these=options.none_of_these, multi_label=options.multi_label)
    console = Console(stderr=True)
    if told := notice(classifier):
        console.print(told, soft_wrap=True, highlight=False, markup=False)
    if window:
        return along_time(options, classifier, videos[0], labels, console, window, step)
    return one_by_one(options, classifier, videos, labels, console)


def one_by_one(
    options: Predict, classifier: Classifier, videos: Sequence[str], labels: Mapping[str, Sequence[str]], told: Console
) -> bool:
    """What each video shows, as a whole."""
    from applications.openvclip.commands import answers
    from applications.openvclip.inference.many import look_at
    from applications.openvclip.progress import progress_bar

    rows = []
    with progress_bar(told) as progress:
        task = progress.add_task("looking", total=len(videos))
        for seen in look_at(classifier, videos, workers=options.workers, time_limit_s=options.time_limit_s):
            found = None
            if seen.embeddings is not None:
                found = classifier.ranked(
                    seen.embeddings, labels, none_of_these=options.none_of_these, multi_label=options.multi_label
                )
            rows.append((seen, found))
            progress.advance(task)
    answers.show(rows, classifier, as_json=options.json, as_csv=options.csv, top=options.top)
    return all(found is not None for _, found in rows)


def along_time(
    options: Predict,
    classifier: Classifier,
    video: str,
    labels: Mapping[str, Sequence[str]],
    told: Console,
    window: float,
    step: float,
) -> bool:
    """What one video shows, and when."""
    from applications.openvclip.commands import answers
    from applications.openvclip.data.decode import VideoReadError
    from applications.openvclip.inference.timeline import plot_timeline
    from applications.openvclip.inference.windows import Windows, look_along, segments
    from applications.openvclip.progress import progress_bar

    with progress_bar(told, "windows") as progress:
        task = progress.add_task("looking", total=None)
        try:
            timeline = look_along(
                classifier,
                video,
                Windows(window, step, classifier.views.sampling.frames, classifier.views.size, classifier.views.cache),
                workers=options.workers,
                time_limit_s=options.time_limit_s,
                advance=lambda done, total: progress.update(task, completed=done, total=total),
            )
        except VideoReadError as error:
            told.print(str(error), style="red", soft_wrap=True, markup=False)
            return False
    names = classifier.answers(labels, none_of_these=options.none_of_these)
    probabilities = classifier.probabilities(timeline.embeddings, labels, none_of_these=options.none_of_these).numpy()
    found = segments(timeline, names, probabilities)
    plot_timeline(options.timeline, timeline, names, probabilities, found)
    answers.show_along(timeline, names, probabilities, found, as_json=options.json, as_csv=options.csv)
    told.print(f"along time: {options.timeline}", soft_wrap=True, highlight=False, markup=False)
    return True
