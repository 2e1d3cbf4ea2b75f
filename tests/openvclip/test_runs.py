"""What a run leaves behind: its journal, where it comes from, and how far it is."""

import io
import json
import subprocess
import types
from pathlib import Path

import pytest
from rich.console import Console

from applications.openvclip import progress
from applications.openvclip.commands import compare
from applications.openvclip.runs import provenance
from applications.openvclip.runs.journal import Journal, read_journal


def test_a_line_that_a_crash_left_incomplete_is_replaced_and_the_rest_stays(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    journal.write("start", name="é")
    journal.write("step", step=1)
    with journal.path.open("a") as file:
        file.write('{"event": "step", "st')
    assert [e["event"] for e in read_journal(journal.path)] == ["start", "step"]
    journal.write("resume", step=1)
    assert [e["event"] for e in read_journal(journal.path)] == ["start", "step", "resume"]
    assert all(json.loads(line) for line in journal.path.read_text(encoding="utf-8").splitlines())


def test_a_journal_whose_first_line_is_torn_begins_anew(tmp_path: Path) -> None:
    (tmp_path / "journal.jsonl").write_text('{"eve')
    Journal(tmp_path / "journal.jsonl").write("start")
    assert [e["event"] for e in read_journal(tmp_path / "journal.jsonl")] == ["start"]


def test_versions_are_found_whatever_distribution_a_module_comes_from(monkeypatch) -> None:
    found = provenance.packages_distributions()
    monkeypatch.setattr(provenance, "packages_distributions", lambda: {**found, "torchvision": ["numpy"], "av": []})
    versions = provenance.versions()
    assert "torchvision" not in versions
    assert "av" not in versions
    assert {"python", "torch", "numpy"} <= versions.keys()


def test_the_commit_is_that_of_the_checkout_and_a_change_is_said(tmp_path: Path, monkeypatch) -> None:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    module = tmp_path / "provenance.py"
    module.write_text("")
    monkeypatch.setattr(provenance, "__file__", str(module))
    assert provenance.commit() is None
    git("init", "-q")
    assert provenance.commit() is None, "a checkout of something else around it"
    git("add", ".")
    git("commit", "-qm", "one")
    assert provenance.commit() == git("rev-parse", "HEAD")
    module.write_text("changed")
    assert provenance.commit() == git("rev-parse", "HEAD") + "-dirty"


def test_a_log_has_lines_with_what_is_done_how_fast_and_the_time_left(monkeypatch) -> None:
    log = io.StringIO()
    clock = types.SimpleNamespace(now=0.0)
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock.now)
    with progress.progress_bar(Console(file=log), unit="clips") as bar:
        bar.get_time = lambda: clock.now
        task = bar.add_task("fine-tuning", total=400)
        for i in range(100):
            clock.now += 1.0
            bar.update(task, advance=4, description=f"fine-tuning, loss {i}")
    lines = log.getvalue().splitlines()
    assert [line.partition(" of ")[0].rpartition(": ")[2] for line in lines] == ["120", "240", "360", "400"]
    assert lines[0] == "fine-tuning, loss 29: 120 of 400 clips, 4 clips/s, 0:01:10 left"


def test_the_last_line_of_a_log_is_said_once() -> None:
    log = io.StringIO()
    with progress.progress_bar(Console(file=log)) as bar:
        task = bar.add_task("evaluating", total=2)
        bar.advance(task, 2)
        bar.advance(task, 0)  # what other processes have read meanwhile
        bar.update(task, description="evaluating")
    assert log.getvalue().count("2 of 2 videos") == 1


def test_compare_without_results_or_with_something_else_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="got none"):
        compare.compare(())
    with pytest.raises(FileNotFoundError, match=r"results\.json: no such file"):
        compare.compare((tmp_path,))
    (tmp_path / "results.json").write_text('{"metric": "accuracy"}')
    with pytest.raises(ValueError, match="not the results of an evaluation"):
        compare.compare((tmp_path,))
