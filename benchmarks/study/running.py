"""Runs of training, each a run folder of the application's own: what has ended is left, what was stopped goes on."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from applications.openvclip.commands.train import parse
from applications.openvclip.config import to_dict
from applications.openvclip.data.manifest import write_manifest
from applications.openvclip.miniature import tasks
from applications.openvclip.runs.folder import RunFolder, differences
from benchmarks.study.methods import SETS, Training


@dataclass(frozen=True)
class Job:
    """One training with one seed."""

    training: Training
    seed: int
    folder: RunFolder
    options: tuple[str, ...]

    @property
    def few_videos(self) -> Path | None:
        """The list to train on, where that is not the whole set."""
        n = self.training.videos_per_class
        return self.folder.path.parents[1] / f"train-{n}-seed-{self.seed}.csv" if n else None

    @property
    def arguments(self) -> list[str]:
        """Of `openvclip train`; later options overrule earlier ones."""
        return [
            *("miniature", "--output", str(self.folder.path), "--seed", str(self.seed), "--data.workers", "1"),
            *("--data.decoded", str(self.folder.path.parents[1] / f"decoded-{self.seed}")),
            *("--data.test", *(f"miniature:{name}" for name in SETS)),
            *(("--data.train", str(self.few_videos)) if self.few_videos else ()),
            *self.training.options,
            *self.options,
        ]


def jobs(trainings: Sequence[Training], seeds: Sequence[int], folder: Path, options: Sequence[str] = ()) -> list[Job]:
    """All runs, a seed after the other, so that what has all methods is there as early as can be.

    Args:
        trainings: What to train.
        seeds: Each with every training.
        folder: Where the run folders are.
        options: Of `openvclip train`, for all runs.
    """
    made = []
    for seed in seeds:
        for training in trainings:
            path = folder / training.name.replace(",", "").replace(" ", "-") / f"seed-{seed}"
            made.append(Job(training, seed, RunFolder(path), tuple(options)))
    return made


def run_all(jobs: Sequence[Job], parallel: int, say: Callable[[str], object] = print) -> None:
    """Run what has not ended yet, several at a time, and say how far it is and how long it will take.

    Raises:
        FileExistsError: A run that has ended was made with other settings.
        RuntimeError: A run failed or was stopped; the others that had begun have ended.
    """
    missing = [job for job in jobs if not ended(job)]
    say(f"{len(jobs)} runs, {len(jobs) - len(missing)} of them there already")
    lists = {job.few_videos: job for job in missing if job.few_videos}  # once, before any of the runs reads one
    for path, job in lists.items():
        write_few(path, job.seed, job.training.videos_per_class or 0)
    began = time.monotonic()
    with ThreadPoolExecutor(parallel) as pool:
        futures = {pool.submit(run, job): job for job in missing}
        try:
            for n, future in enumerate(as_completed(futures), 1):
                future.result()
                job, left = futures[future], (time.monotonic() - began) / n * (len(missing) - n)
                say(f"{n} of {len(missing)}: {job.training.name}, seed {job.seed}; about {left / 60:.0f} min left")
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def ended(job: Job) -> bool:
    if not job.folder.results.exists():
        return False
    changed = differences(job.folder.read_settings(), to_dict(parse(job.arguments)))
    if changed:
        raise FileExistsError(
            f"{job.folder.path} holds a run with other settings ({', '.join(changed)}); choose another --output."
        )
    return True


def run(job: Job) -> None:
    """Train and evaluate, in a process of its own on one thread; its output is kept beside the run folder."""
    log = job.folder.path.with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as output:
        code = subprocess.run(
            [sys.executable, "-m", "applications.openvclip.train", *job.arguments],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
        ).returncode
    if code or not job.folder.results.exists():
        raise RuntimeError(f"{job.training.name}, seed {job.seed}: exit code {code} and no results; see {log}.")


def write_few(path: Path, seed: int, videos_per_class: int) -> None:
    """A list of the first videos of every class of a seed's training set."""
    manifest = tasks.prepare(seed)["train"]
    seen: Counter[int] = Counter()
    chosen = []
    for i, label in enumerate(manifest.labels):
        seen[label] += 1
        if seen[label] <= videos_per_class:
            chosen.append(i)
    write_manifest(path, manifest.only(chosen))
