"""Runs of training, each a run folder of the application's own: what has ended is left, what was stopped goes on."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from applications.openvclip.commands.train import parse
from applications.openvclip.config import Config, from_dict, to_dict
from applications.openvclip.data.manifest import write_manifest
from applications.openvclip.miniature import tasks, tiny_clip
from applications.openvclip.runs.folder import RunFolder, differences
from applications.openvclip.runs.weights import load_weights, save_weights
from benchmarks.study.methods import SETS, Mixture, Training
from interpolate import patch
from interpolate.depth import by_depth


@dataclass(frozen=True)
class Job(ABC):
    """A folder of results to come by, with one seed."""

    name: str
    seed: int
    folder: RunFolder

    @property
    @abstractmethod
    def settings(self) -> list[str]:
        """What tells it from others, but for the seed."""

    @abstractmethod
    def ended(self) -> bool:
        """Whether its results are there."""

    @abstractmethod
    def run(self) -> None:
        """Come by them, in a process of its own on one thread; its output is kept beside the folder."""

    def _run(self, *arguments: str) -> None:
        log = self.folder.path.with_suffix(".log")
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a") as output:
            code = subprocess.run(
                [sys.executable, "-m", "applications.openvclip", *arguments],
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                stdout=output,
                stderr=subprocess.STDOUT,
            ).returncode
        if code or not self.folder.results.exists():
            raise RuntimeError(f"{self.name}, seed {self.seed}: exit code {code} and no results; see {log}.")


@dataclass(frozen=True)
class Trained(Job):
    """A run of training."""

    training: Training
    options: tuple[str, ...]

    @property
    def settings(self) -> list[str]:
        videos = self.training.videos_per_class
        return [*self.training.options, *self.options, *([f"{videos} videos a class"] if videos else [])]

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

    def ended(self) -> bool:
        if not self.folder.results.exists():
            return False
        before, now = from_dict(self.folder.read_settings()), parse(self.arguments)
        changed = differences(*(to_dict(_wherever(config)) for config in (before, now)))
        if changed:
            raise FileExistsError(
                f"{self.folder.path} holds a run with other settings ({', '.join(changed)}); choose another --output."
            )
        return True

    def run(self) -> None:
        self._run("train", *self.arguments)


def _wherever(config: Config) -> Config:
    """The same, wherever the study is: its folder may be moved, and the lists of few videos with it."""
    train = None if config.data.train is None else Path(config.data.train).name
    return replace(config, output=None, data=replace(config.data, decoded=None, train=train))


@dataclass(frozen=True)
class Mixed(Job):
    """What is made of runs of training that have ended, as if it were one."""

    mixture: Mixture

    @property
    def settings(self) -> list[str]:
        return ["mean of", *self.mixture.trainings, f"{self.mixture.shallow:g} of the anchor in the first block"]

    @property
    def parts(self) -> list[RunFolder]:
        return [RunFolder(path_of(self.folder.path.parents[1], name, self.seed)) for name in self.mixture.trainings]

    def ended(self) -> bool:
        """Whether its results are there, and of the averages that are there."""
        if not self.folder.results.exists():
            return False
        averages = [part.averaged.stat().st_mtime for part in self.parts if part.averaged.exists()]
        return self.folder.results.stat().st_mtime >= max(averages, default=0)

    def run(self) -> None:
        runs = self.parts
        averages, metadata = zip(*(load_weights(run.averaged) for run in runs), strict=True)
        mean = {name: torch.stack([weights[name] for weights in averages]).mean(0) for name in averages[0]}
        anchor = tiny_clip.load_pretrained(torch.device("cpu")).clip.state_dict()
        mixed = patch(anchor, mean, anchor_weight=by_depth(mean, first=self.mixture.shallow, last=0.0))
        self.folder.path.mkdir(parents=True, exist_ok=True)
        self.folder.write_settings(runs[0].read_settings())
        save_weights(self.folder.averaged, mixed, metadata[0] | {"content": self.name})
        self._run("evaluate", str(self.folder.path))


def jobs(
    trainings: Sequence[Training],
    mixtures: Sequence[Mixture],
    seeds: Sequence[int],
    folder: Path,
    options: Sequence[str] = (),
) -> list[Job]:
    """All there is to do, a seed after the other, so that what has all methods is there as early as can be.

    Args:
        trainings: What to train.
        mixtures: What to make of it.
        seeds: Each with every training.
        folder: Where the run folders are.
        options: Of `openvclip train`, for all runs.
    """
    made: list[Job] = []
    for seed in seeds:
        for t in trainings:
            made.append(Trained(t.name, seed, RunFolder(path_of(folder, t.name, seed)), t, tuple(options)))
        for m in mixtures:
            made.append(Mixed(m.name, seed, RunFolder(path_of(folder, m.name, seed)), m))
    return made


def path_of(folder: Path, name: str, seed: int) -> Path:
    return folder / name.replace(",", "").replace(" ", "-") / f"seed-{seed}"


def run_all(jobs: Sequence[Job], parallel: int, say: Callable[[str], object] = print) -> None:
    """Do what has not ended yet, several at a time, and say how far it is and how long it will take.

    Raises:
        FileExistsError: A run that has ended was made with other settings.
        RuntimeError: A run failed or was stopped; the others that had begun have ended.
    """
    missing = [job for job in jobs if not job.ended()]
    say(f"{len(jobs)} runs, {len(jobs) - len(missing)} of them there already")
    trained = [job for job in missing if isinstance(job, Trained)]
    lists = {job.few_videos: job for job in trained if job.few_videos}  # once, before any of the runs reads one
    for path, job in lists.items():
        write_few(path, job.seed, job.training.videos_per_class or 0)
    began, done = time.monotonic(), 0
    for kind in (Trained, Mixed):  # which are made of the former
        with ThreadPoolExecutor(parallel) as pool:
            futures = {pool.submit(job.run): job for job in missing if isinstance(job, kind)}
            try:
                for future in as_completed(futures):
                    future.result()
                    job, done = futures[future], done + 1
                    left = (time.monotonic() - began) / done * (len(missing) - done)
                    say(f"{done} of {len(missing)}: {job.name}, seed {job.seed}; about {left / 60:.0f} min left")
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise


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
