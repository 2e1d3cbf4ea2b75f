"""What the study concludes from accuracies, by hand-computed cases."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from applications.openvclip.commands.train import parse
from applications.openvclip.config import to_dict
from applications.openvclip.miniature import tasks, tiny_clip
from applications.openvclip.ranges import check, training_ranges
from applications.openvclip.runs.weights import load_weights
from benchmarks.measuring import RESULTS
from benchmarks.study import findings, report
from benchmarks.study.__main__ import main
from benchmarks.study.analysis import Estimate, estimate, front, gap, gaps, overlap, paired, useful_branch, verdict
from benchmarks.study.findings import Findings
from benchmarks.study.methods import (
    CLAIMS,
    MIXTURES,
    ROWS,
    SEEDS,
    SETS,
    SIZES,
    TRAININGS,
    VARIATIONS,
    Mixture,
    claims_of,
    trainings_of,
)
from benchmarks.study.running import Job, Trained, jobs, run_all, write_few
from tests.openvclip.conftest import small_world as small_world

ACCURACIES = st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), min_size=2, max_size=8)


def test_the_useful_branch_ends_at_the_best_closed_accuracy() -> None:
    assert useful_branch([(3, 5), (5, 6), (4, 9), (7, 5), (6, 4)]) == [(3, 5), (5, 6), (7, 5)]


def test_the_gap_is_the_mean_over_what_both_curves_reach() -> None:
    # from 2 to 5, where the first curve is 4, 6, 6 at 2, 4, 5 and the second 4 throughout: (1 * 2 + 2) / 3
    assert gap([(0, 0), (2, 4), (4, 6), (8, 6), (7, 0)], [(0, 0), (1, 4), (5, 4)]) == pytest.approx(4 / 3)


def test_curves_without_a_common_closed_accuracy_are_not_compared() -> None:
    assert gap([(0, 0), (1, 1), (2, 1)], [(0, 0), (3, 1), (4, 1)]) is None
    assert gap([(0, 0)], [(0, 0), (3, 1)]) is None
    assert overlap([(0, 0), (2, 1), (4, 0)], [(0, 0), (3, 1), (9, 1)]) == (3, 4)
    assert gaps({1: [(0, 0), (2, 2), (4, 2)], 2: [(0, 0)]}, {1: [(0, 0), (2, 1), (4, 1)], 2: [(0, 0)]}) is None


@given(ACCURACIES, ACCURACIES)
def test_the_gap_of_swapped_methods_has_the_other_sign(a: list, b: list) -> None:
    found = gap(a, b)
    assert gap(b, a) == (None if found is None else pytest.approx(-found))


@given(ACCURACIES, st.integers(-5, 5))
def test_the_gap_of_a_curve_over_itself_moved_up_is_how_far(curve: list, up: int) -> None:
    assert gap([(x, y + up) for x, y in curve], curve) in (None, pytest.approx(up))


def test_a_method_that_only_slides_along_the_curve_has_no_gap() -> None:
    line = [(x, 10 - x) for x in range(8)]
    assert gap(line[::2], line) == pytest.approx(0)


def test_the_interval_is_students() -> None:
    assert estimate([1.0, 3.0]) == Estimate(mean=2.0, std=2**0.5, low=2 - 12.706, high=2 + 12.706, n=2)
    found = estimate([2.0, 4.0, 4.0, 5.0, 5.0])  # 4 ± 2.776 * sqrt(1.5 / 5)
    assert (found.low, found.high) == pytest.approx((2.4795, 5.5205), abs=1e-4)


@pytest.mark.parametrize("n", [2, 3, 5, 15])
def test_an_interval_leaves_out_a_true_zero_as_rarely_as_it_says(n: int) -> None:
    drawn = np.random.default_rng(0).standard_normal((4000, n))
    assert np.mean([verdict(estimate(values)) != "within noise" for values in drawn.tolist()]) == pytest.approx(
        0.05, abs=0.012 if n <= 11 else 0.02
    )


@given(ACCURACIES)
def test_no_other_point_of_the_branch_is_better_than_its_front(curve: list) -> None:
    branch, raised = useful_branch(curve), front(curve)
    assert [closed for closed, _ in raised] == [closed for closed, _ in branch]
    assert [other for _, other in raised] == [max(y for x, y in branch if x >= closed) for closed, _ in branch]


def test_a_verdict_needs_an_interval_on_one_side_of_zero() -> None:
    assert verdict(estimate([0.19, 0.2])) == "held"
    assert verdict(estimate([-0.19, -0.2])) == "not held"
    assert verdict(estimate([-0.1, 0.2])) == "within noise"
    assert verdict(estimate([0.1])) == "one seed"
    assert verdict(None) == "cannot be compared"


def test_differences_are_paired_by_seed() -> None:
    assert paired({1: 5.0, 2: 9.0, 3: 1.0}, {2: 8.0, 1: 3.0}) == estimate([2.0, 1.0])
    assert paired({1: 5.0}, {2: 5.0}) is None


def test_every_row_and_claim_is_of_something_trained() -> None:
    assert {row.training for row in ROWS} == {made.name for made in (*TRAININGS, *MIXTURES)}
    names = [row.name for row in ROWS]
    assert len(set(names)) == len(names)
    claims = [*CLAIMS, *(claim for variation in VARIATIONS for claim in claims_of(variation))]
    assert {name for claim in claims for name in (claim.better, claim.worse)} <= set(names)
    assert len({claim.text for claim in claims}) == len(claims)
    assert {*report.TABLE_4, *report.TABLE_5, *report.FIGURE_2, *report.FIGURE_3} <= set(names)
    assert [len(trainings_of(size)) * len(SEEDS[size]) for size in SIZES] == [4, 55, 135]


def test_what_would_be_trained_is_a_valid_configuration(tmp_path: Path) -> None:
    made = jobs(TRAININGS, MIXTURES, (10,), tmp_path)
    for job in made:
        if isinstance(job, Trained):
            check(training_ranges(parse(job.arguments)))
    assert not any(job.ended() for job in made)
    assert len({job.folder.path for job in made}) == len(TRAININGS) + len(MIXTURES)
    assert {name for mixture in MIXTURES for name in mixture.trainings} <= {t.name for t in trainings_of("default")}


def test_a_finished_run_with_other_settings_is_refused(tmp_path: Path) -> None:
    (job,), (other,) = (jobs(TRAININGS[:1], (), (10,), tmp_path, more) for more in ((), ("--optimization.epochs", "7")))
    assert isinstance(job, Trained)
    job.folder.path.mkdir(parents=True)
    job.folder.write_settings(to_dict(parse(job.arguments)))
    job.folder.results.write_text("{}")
    assert job.ended()
    with pytest.raises(FileExistsError, match="epochs: 3, now 7"):
        other.ended()


def made_up() -> Findings:
    """Two seeds of two trainings, in which IWR lies 2 points above and SWA, the baseline, is a straight line."""

    def sets(up: float) -> dict[str, dict[str, float]]:
        weights = (1.0, 0.75, 0.5, 0.0)
        found: dict[str, dict[str, float]] = {name: {"CLIP*": 0.3} for name in SETS}
        for prefix, name in [(prefix, name) for prefix in ("", "last ") for name in SETS]:
            for weight in weights:
                y = 0.2 + 0.4 * (1 - weight) if name == "closed" else 0.5 - 0.2 * (1 - weight) + up * (weight < 1)
                found[name][f"{prefix}{weight:g}"] = y
        return found

    accuracy = {name: {"10": sets(up), "11": sets(up + 0.01)} for name, up in (("plain", 0.0), ("iwr", 0.02))}
    provenance: dict[str, Any] = {"command": "study", "commits of the runs": ["abc"], "versions": {}, "hardware": {}}
    settings = {"plain": ["--method", "swa"], "iwr": ["--method", "open-vclip"]}
    return Findings("quick", [10, 11], provenance, settings, {}, accuracy)


def test_a_report_says_what_became_of_each_claim(tmp_path: Path) -> None:
    findings.write(made_up(), tmp_path / "findings.json")
    assert findings.read(tmp_path / "findings.json") == made_up()
    report.write(made_up(), tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert (
        "| IWR adds to SWA | **held** | 30 to 60 | +2.0 [+2.0, +2.0] | +2.0 [+2.0, +2.0] | +0.0 [+0.0, +0.0] | +2.0"
        in text
    )
    assert "| SWA lifts the curve of fine-tuning | **within noise** | 30 to 60 | +0.0 [+0.0, +0.0]" in text
    assert "| l2" not in text  # rows of what was not trained are left out
    assert "| IWR + SWA + patch | 40.0 ± 0.0 | 42.5 ± 0.7 |" in text
    assert "| CLIP*, temporal | 20.0 ± 0.0 | 50.0 ± 0.0 |" in text
    assert (tmp_path / "figure-2.png").stat().st_size > 1000
    assert (tmp_path / "figure-3.png").stat().st_size > 1000


def test_claims_are_judged_under_other_conditions_and_settings_beside_the_recipes() -> None:
    found = made_up()
    assert "## With" not in report.markdown(found)
    of_the_recipe = found.accuracy["plain"], found.accuracy["iwr"]
    found.accuracy.update(zip(("plain, cosine", "iwr, max-alpha 0.3"), of_the_recipe, strict=True))
    found.accuracy["iwr, cosine"] = {"10": of_the_recipe[1]["10"]}
    text = report.markdown(found)
    schedule, settings = text.index("## With another schedule"), text.index("## With other settings")
    assert schedule < text.index("| IWR adds to SWA, cosine (1 seed) | **one seed** | 30 to 60 | +2.0") < settings
    assert settings < text.index("| max-alpha 0.3 is better than 0.6 | **within noise** | 30 to 60 | +0.0")
    assert "| IWR + SWA + patch, cosine (1 seed) | 40.0 | 42.0 |" in text


def test_runs_whose_folders_are_gone_stay_in_the_findings() -> None:
    hashes = {seed: dict.fromkeys(SETS, "hash") for seed in ("10", "11")}
    earlier, now = (replace(made_up(), protocols=hashes) for _ in range(2))
    made_again = {"plain": {"11": now.accuracy["iwr"]["11"]}}
    settings = {"plain": now.settings["plain"]}
    now = replace(now, seeds=[11], settings=settings, protocols={"11": hashes["11"]}, accuracy=made_again)
    earlier = replace(earlier, size="full", provenance=earlier.provenance | {"commits of the runs": ["earlier"]})
    both = findings.together(now, earlier)
    assert (both.size, both.seeds, both.protocols) == ("full", [10, 11], hashes)
    assert both.settings == earlier.settings
    assert both.provenance["commits of the runs"] == ["abc", "earlier"]
    assert both.accuracy["iwr"] == earlier.accuracy["iwr"]
    assert both.accuracy["plain"] == {"10": earlier.accuracy["plain"]["10"], **made_again["plain"]}


@pytest.mark.parametrize("other", ["versions", "settings", "hash", "CLIP*"])
def test_runs_that_cannot_be_compared_are_not_put_together(other: str) -> None:
    now, earlier = (replace(made_up(), protocols={"10": dict.fromkeys(SETS, "hash")}) for _ in range(2))
    if other == "versions":
        earlier.provenance["versions"] = {"torch": "1.0"}
    elif other == "settings":
        earlier.settings["iwr"] = ["--regularizer.strength", "7"]
    elif other == "hash":
        earlier.protocols["10"]["closed"] = "other"
    else:
        earlier.accuracy["plain"]["10"]["closed"]["CLIP*"] = 0.9
    said = {"versions": "torch.*1.0", "settings": "of iwr.*7", "hash": "seed 10.*other", "CLIP*": "0.9"}
    with pytest.raises(ValueError, match=said[other]):
        findings.together(now, earlier)


def test_a_study_may_be_moved(tmp_path: Path) -> None:
    few = [t for t in TRAININGS if t.videos_per_class][:1]
    (job,) = jobs(few, (), (10,), tmp_path / "before")
    assert isinstance(job, Trained)
    job.folder.path.mkdir(parents=True)
    job.folder.write_settings(to_dict(parse(job.arguments)))
    job.folder.results.write_text("{}")
    (tmp_path / "before").rename(tmp_path / "after")
    assert jobs(few, (), (10,), tmp_path / "after")[0].ended()


def test_a_mixture_is_made_again_when_a_part_was(tmp_path: Path) -> None:
    part, mixed = jobs(trainings_of("quick")[1:], (Mixture("by depth", ("iwr",)),), (10,), tmp_path)
    for path in (part.folder.averaged, mixed.folder.results):
        path.parent.mkdir(parents=True)
        path.touch()
    os.utime(part.folder.averaged, (1, 1))
    assert mixed.ended()
    os.utime(part.folder.averaged, (1, mixed.folder.results.stat().st_mtime + 1))
    assert not mixed.ended()


@pytest.mark.parametrize(
    ("arguments", "said"), [(["--parallel", "0"], "at least one run"), (["--report-only"], "no run in .* has ended")]
)
def test_what_cannot_be_done_is_said_at_once(tmp_path: Path, arguments: list[str], said: str, capsys) -> None:
    with pytest.raises(SystemExit):
        main([*arguments, "--runs", str(tmp_path)])
    assert re.search(said, capsys.readouterr().err)


def test_the_shipped_report_is_of_the_shipped_findings() -> None:
    folder = RESULTS / "study"
    found = findings.read(folder / "findings.json")
    assert (folder / "report.md").read_text() == report.markdown(found)


def test_fewer_videos_are_the_first_of_every_class(tmp_path: Path, small_world: dict[str, Path], monkeypatch) -> None:
    from applications.openvclip.data.manifest import read_manifest

    whole = read_manifest(small_world["train"])
    monkeypatch.setattr(tasks, "prepare", lambda seed: {"train": whole})
    write_few(tmp_path / "few.csv", 10, 2)
    few = read_manifest(tmp_path / "few.csv")
    assert few.classes == whole.classes
    assert [few.labels.count(i) for i in range(len(few.classes))] == [2] * len(whole.classes)
    assert few.location(0) == whole.location(0)


def tiny(small_world: dict[str, Path], folder: Path) -> list[Job]:
    """Two seeds of a training of six steps, and what is made of it."""
    options = (
        *("--data.train", str(small_world["train"]), "--optimization.batch-size", "8", "--averager.start-epoch", "1"),
        *("--data.test", str(small_world["closed"]), "--evaluation.anchor-weights", "0", "0.5", "1"),
        *("--checkpoint.every-steps", "1"),
    )
    return jobs(trainings_of("quick")[1:], (Mixture("by depth", ("iwr",), shallow=0.5),), (10, 11), folder, options)


@pytest.mark.slow
def test_a_killed_study_goes_on_to_the_same_findings(tmp_path: Path, small_world: dict[str, Path]) -> None:
    code = (
        "import json, sys; from pathlib import Path; from tests.benchmarks.test_study import run_all, tiny; "
        "run_all(tiny({k: Path(v) for k, v in json.loads(sys.argv[1]).items()}, Path(sys.argv[2])), 2)"
    )
    world = json.dumps({name: str(path) for name, path in small_world.items()})
    process = subprocess.Popen([sys.executable, "-c", code, world, str(tmp_path / "killed")], start_new_session=True)
    while not list((tmp_path / "killed").glob("*/*/checkpoints/step-*")):
        assert process.poll() is None, "the study ended before it could be killed"
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)  # with the runs it has started
    process.wait()
    killed, whole = (tiny(small_world, tmp_path / name) for name in ("killed", "whole"))
    assert not all(job.ended() for job in killed)
    said: list[str] = []
    run_all(killed, 2, said.append)
    assert "about 0 min left" in said[-1]
    run_all(whole, 2)
    found = [findings.gather(made, "quick") for made in (killed, whole)]
    assert found[0].accuracy == found[1].accuracy
    assert found[0].protocols == found[1].protocols
    assert {name: set(by_seed) for name, by_seed in found[0].accuracy.items()} == {
        "iwr": {"10", "11"},
        "by depth": {"10", "11"},
    }
    run_all(killed, 2, said.append)
    assert said[-1] == "4 runs, 4 of them there already"
    theta, mixed = (
        load_weights(tmp_path / "killed" / name / "seed-10" / "averaged.safetensors")[0] for name in ("iwr", "by-depth")
    )
    anchor = tiny_clip.load_pretrained(torch.device("cpu")).clip.state_dict()
    blocks = sorted({name.split(".")[3] for name in theta if name.startswith("visual.transformer.resblocks.")})
    for block, weight in ((blocks[0], 0.5), (blocks[-1], 0.0)):
        name = f"visual.transformer.resblocks.{block}.mlp.c_fc.weight"
        torch.testing.assert_close(mixed[name], theta[name].lerp(anchor[name], weight))
