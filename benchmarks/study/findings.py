"""What all runs of a study found, in one file, and the figures that reports are made of."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from applications.openvclip.runs.provenance import provenance
from applications.openvclip.runs.texts import write_text
from applications.openvclip.zeroshot.results import BASELINE, read_results
from benchmarks.study.analysis import Curve
from benchmarks.study.methods import SIZES, ZERO_SHOT, Row, Size, scorer
from benchmarks.study.running import Job

Accuracies = dict[str, dict[str, float]]
"""By set, then by scorer: top-1 in [0, 1]."""


@dataclass(frozen=True)
class Findings:
    """The accuracies of every training and seed, and where they come from."""

    size: Size
    seeds: list[int]
    provenance: dict[str, Any]
    protocols: dict[str, dict[str, str]]
    """By seed, then by set: the hash of what was evaluated on."""
    accuracy: dict[str, dict[str, Accuracies]]
    """By training, then by seed."""

    def of(self, training: str) -> dict[int, Accuracies]:
        return {int(seed): found for seed, found in self.accuracy.get(training, {}).items()}

    def reference(self, seed: str) -> dict[str, tuple[str, float]]:
        """What all runs with a seed have in common, by set: the hash of the protocol, and the accuracy of CLIP*."""
        run = next(by_seed[seed] for by_seed in self.accuracy.values() if seed in by_seed)
        return {name: (digest, run[name][BASELINE]) for name, digest in self.protocols[seed].items()}

    def values(self, row: Row, measure: str) -> dict[int, float]:
        """A row's accuracy by seed: of a set, or of "zero-shot", the mean of three sets."""
        return {seed: value(found, measure, row.scorer) for seed, found in self.of(row.training).items()}

    def baseline(self, scorer: str, measure: str) -> dict[int, float]:
        """The same of a model that is not trained, which all trainings with a seed have in common."""
        runs: list[dict[int, Accuracies]] = [self.of(training) for training in self.accuracy]
        return {seed: value(run[seed], measure, scorer) for run in reversed(runs) for seed in run}

    def curves(self, row: Row, measure: str = "zero-shot") -> dict[int, Curve]:
        """By seed: closed accuracy and another, from the anchor to the fine-tuned weights."""
        found: dict[int, Curve] = {}
        for seed, sets in self.of(row.training).items():
            weights = sorted((float(s) for s in sets["closed"] if s[0].isdigit()), reverse=True)
            scorers = [scorer(row.averaged, weight) for weight in weights]
            found[seed] = [(sets["closed"][s], value(sets, measure, s)) for s in scorers]
        return found


def value(found: Accuracies, measure: str, scorer: str) -> float:
    if measure == "zero-shot":
        return fmean(found[name][scorer] for name in ZERO_SHOT)
    return found[measure][scorer]


def gather(jobs: Sequence[Job], size: Size) -> Findings:
    """Read the results of runs that have ended.

    Raises:
        ValueError: Two runs with one seed were evaluated on different things, or differ in a model that is not trained.
    """
    accuracy: dict[str, dict[str, Accuracies]] = {}
    protocols: dict[str, dict[str, str]] = {}
    commits: set[str] = set()
    baselines: dict[str, dict[str, float]] = {}
    for job in jobs:
        results = read_results(job.folder.results)
        commits.add(str(results.provenance["commit"]))
        found = {name.rpartition("/")[2]: result for name, result in results.protocols.items()}
        seed, hashes = str(job.seed), {name: result.hash for name, result in found.items()}
        baseline = {name: result.mean_std(BASELINE)[0] for name, result in found.items()}
        if protocols.setdefault(seed, hashes) != hashes or baselines.setdefault(seed, baseline) != baseline:
            raise ValueError(
                f"{job.folder.path}: evaluated on {hashes}, with {BASELINE} at {baseline}; other runs with seed {seed} "
                f"on {protocols[seed]}, at {baselines[seed]}. They can't be compared; run the study in another folder."
            )
        accuracy.setdefault(job.name, {})[seed] = {
            name: {scorer: result.mean_std(scorer)[0] for scorer in result.accuracy} for name, result in found.items()
        }
    return Findings(
        size,
        sorted({job.seed for job in jobs}),
        provenance() | {"commits of the runs": sorted(commits)},
        protocols,
        accuracy,
    )


def with_earlier(now: Findings, earlier: Findings) -> Findings:
    """What was found now, and of what was found earlier the runs that were not made again: their folders may be gone.

    Raises:
        ValueError: They can't be compared: made with other versions, or a seed was evaluated on other things.
    """
    a, b = now.provenance["versions"], earlier.provenance["versions"]
    if a != b:
        raise ValueError(f"that was with the versions {b}, this with {a}")
    for seed in now.protocols.keys() & earlier.protocols.keys():
        if now.reference(seed) != earlier.reference(seed):
            raise ValueError(f"with seed {seed} that was on {earlier.reference(seed)}, this on {now.reference(seed)}")
    commits = {*now.provenance["commits of the runs"], *earlier.provenance["commits of the runs"]}
    return Findings(
        max(now.size, earlier.size, key=SIZES.index),
        sorted({*now.seeds, *earlier.seeds}),
        now.provenance | {"commits of the runs": sorted(commits)},
        earlier.protocols | now.protocols,
        {name: earlier.accuracy.get(name, {}) | now.accuracy.get(name, {}) for name in earlier.accuracy | now.accuracy},
    )


def write(findings: Findings, path: Path) -> None:
    write_text(path, json.dumps(asdict(findings), indent=2) + "\n")


def read(path: Path) -> Findings:
    return Findings(**json.loads(path.read_text(encoding="utf-8")))
