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
    """The command that gathered them; versions and hardware are those of the runs."""
    settings: dict[str, list[str]]
    """By training: what was asked for."""
    protocols: dict[str, dict[str, str]]
    """By seed, then by set: the hash of what was evaluated on."""
    accuracy: dict[str, dict[str, Accuracies]]
    """By training, then by seed."""

    def of(self, training: str) -> dict[int, Accuracies]:
        return {int(seed): found for seed, found in self.accuracy.get(training, {}).items()}

    def reference(self, seed: str) -> dict[str, tuple[str, float]] | None:
        """What all runs with a seed have in common, by set: the hash of the protocol, and the accuracy of CLIP*. None
        where there is no such run."""
        if seed not in self.protocols:
            return None
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
        ValueError: Two runs can't be compared: made with other versions, or with one seed on other things.
    """
    found: Findings | None = None
    gathering = provenance()
    for job in jobs:
        results = read_results(job.folder.results)
        protocols = {name.rpartition("/")[2]: result for name, result in results.protocols.items()}
        seed, made = str(job.seed), results.provenance | {"commit": str(results.provenance["commit"])}
        accuracies = {
            name: {scorer: result.mean_std(scorer)[0] for scorer in result.accuracy}
            for name, result in protocols.items()
        }
        of_runs = {"versions": made["versions"], "hardware": made["hardware"], "commits of the runs": [made["commit"]]}
        one = Findings(
            size,
            [job.seed],
            gathering | of_runs,
            {job.name: job.settings},
            {seed: {name: result.hash for name, result in protocols.items()}},
            {job.name: {seed: accuracies}},
        )
        try:
            found = together(one, found) if found else one
        except ValueError as error:
            raise ValueError(f"{job.folder.path} can't be compared with other runs of the study: {error}") from None
    if found is None:
        raise ValueError("no run of the study has ended.")
    return found


def together(now: Findings, earlier: Findings) -> Findings:
    """What was found now, and of what was found earlier the runs that were not made again: their folders may be gone.

    Raises:
        ValueError: They can't be compared: made with other versions or settings, or with one seed on other things.
    """
    for what, a, b in (
        ("versions", earlier.provenance["versions"], now.provenance["versions"]),
        *((f"settings of {name}", earlier.settings.get(name), now.settings[name]) for name in now.settings),
        *((f"sets of seed {s}", earlier.reference(s), now.reference(s)) for s in now.protocols),
    ):
        if a is not None and a != b:
            raise ValueError(f"the {what} were {a}, now {b}.")
    commits = {*now.provenance["commits of the runs"], *earlier.provenance["commits of the runs"]}
    names = earlier.accuracy | now.accuracy
    return Findings(
        max(now.size, earlier.size, key=SIZES.index),
        sorted({*now.seeds, *earlier.seeds}),
        now.provenance | {"commits of the runs": sorted(commits)},
        earlier.settings | now.settings,
        earlier.protocols | now.protocols,
        {name: earlier.accuracy.get(name, {}) | now.accuracy.get(name, {}) for name in names},
    )


def write(findings: Findings, path: Path) -> None:
    write_text(path, json.dumps(asdict(findings), indent=2) + "\n")


def read(path: Path) -> Findings:
    return Findings(**json.loads(path.read_text(encoding="utf-8")))
