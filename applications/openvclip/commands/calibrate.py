"""Find out on held-out videos how sure a run may be: a temperature, and when a video shows none of the labels.

$ openvclip calibrate runs/miniature-… --data miniature:zs_object
$ openvclip predict clip.mp4 --labels "archery,juggling balls" --run runs/… --none-of-these
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import tyro


def main(arguments: Sequence[str] | None = None) -> None:
    tyro.cli(calibrate, prog="openvclip calibrate", description=__doc__, args=arguments)


def calibrate(
    run: tyro.conf.Positional[Path],
    data: str,
    root: str | None = None,
    names: str | None = None,
    anchor_weight: float | None = None,
    workers: int = 2,
    time_limit_s: float = 60.0,
) -> None:
    """Write calibration.json beside the run; `predict --none-of-these` and `evaluate` use it.

    Args:
        run: Folder of a run.
        data: Videos that were not trained on: a folder of class folders, a list, or miniature:zs_object.
        root: Where the videos are that a list names; by default the list's folder.
        names: JSON file of class names to use instead of the tidied ones.
        anchor_weight: Weight of the anchor to calibrate at; by default the run's.
        workers: Processes that decode videos.
        time_limit_s: Seconds that reading one video may take.
    """
    import torch
    from rich.console import Console

    from applications.openvclip import build
    from applications.openvclip.inference.calibration import calibration_of, write_calibration
    from applications.openvclip.inference.classifier import Classifier
    from applications.openvclip.inference.many import look_at
    from applications.openvclip.progress import progress_bar
    from applications.openvclip.runs.folder import RunFolder

    console = Console()
    RunFolder(run).read_settings()  # it is a run
    manifest = build.data_set(data, root, names)
    for line in manifest.lines():
        console.print(line, soft_wrap=True, markup=False, highlight=False)
    classifier = Classifier.load(run, anchor_weight=anchor_weight)
    classes = classifier.embeddings_of(manifest.classes)
    logits, labels = [], []
    videos = [manifest.location(i) for i in range(len(manifest))]
    with progress_bar(console) as progress:
        task = progress.add_task("looking", total=len(videos))
        looked = look_at(classifier, videos, workers=workers, time_limit_s=time_limit_s)
        for seen, label in zip(looked, manifest.labels, strict=True):
            progress.advance(task)
            if seen.embeddings is None:
                console.print(f"unreadable and left out: {seen.video}: {seen.fault}", soft_wrap=True, markup=False)
                continue
            logits.append(classifier.logits(seen.embeddings, classes).mean(dim=0).cpu())
            labels.append(label)
    if not logits:
        raise ValueError(f"{data}: none of its {len(videos)} videos could be read.")
    found = calibration_of(torch.stack(logits), torch.tensor(labels), data)
    path = RunFolder(run).calibration
    write_calibration(path, classifier.anchor_weight, found)
    for line in (
        f"anchor weight {classifier.anchor_weight:g}, {found.videos} videos of {found.classes} classes",
        f"accuracy {100 * found.accuracy:.1f} %, and {100 * found.accuracy_at_95:.1f} % of the surest 95 %",
        f"temperature {found.temperature:.3f}: expected calibration error {100 * found.ece_before:.1f} % before, "
        f"{100 * found.ece_after:.1f} % after",
        f"threshold {found.threshold:.2f}: 95 % of these videos are above it; AUROC of labels against none of them "
        f"{found.auroc:.3f}",
        f"written: {path}",
    ):
        console.print(line, soft_wrap=True, markup=False, highlight=False)
