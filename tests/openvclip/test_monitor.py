"""What is seen of training: every value is where it is looked for, and a resumed run looks like one never stopped."""

import io
import math
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from applications.openvclip import progress
from applications.openvclip.runs.folder import RunFolder
from applications.openvclip.runs.journal import Journal, read_journal
from applications.openvclip.training import curves, monitor
from applications.openvclip.training.monitor import Monitor

STEPS = 8


def values(step: int) -> dict[str, float]:
    return {"loss": 1 / step, "interpolated_loss": 2 / step, "gradient_norm": 0.5, "learning_rate": 1e-3, "alpha": 0.25}


def accuracies(step: int) -> dict[str, Any]:
    return {"anchor_weight": 0.5, "accuracy": {"closed": {"0": step / 10, "0.5": 0.5}, "held-out": {"0.5": 0.25}}}


def train(folder: Path, first: int = 1, last: int = STEPS, tensorboard: bool = False, torn: str = "") -> None:
    """A process that takes some of the steps."""
    journal = Journal(folder / "journal.jsonl")
    journal.cut(first - 1)
    journal.write("start", step=first - 1)
    with Monitor(journal, RunFolder(folder), STEPS, 4, tensorboard) as seen:
        for step in range(first, last + 1):
            if step == 3:
                seen.event("unreadable", step=step, video="a.mp4")
            seen.step(step, values(step), waited_s=0.0)
            if step % 3 == 0:
                seen.event("evaluation", step=step, **accuracies(step))
    with journal.path.open("a") as file:
        file.write(torn)


@pytest.fixture
def nothing_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Monitor, "_draw", lambda self: None)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    clock = types.SimpleNamespace(now=1000.0)
    monkeypatch.setattr(monitor.time, "monotonic", lambda: clock.now)
    return clock


@pytest.mark.usefixtures("nothing_drawn")
def test_the_journal_of_a_run_killed_often_is_that_of_one_never_stopped(tmp_path: Path) -> None:
    def learnt(folder: Path) -> list[dict[str, Any]]:
        events = [e for e in read_journal(folder / "journal.jsonl") if e["event"] != "start"]
        return [{name: value for name, value in e.items() if name not in ("time", "machine")} for e in events]

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    train(whole)
    for first, last in ((1, 2), (1, 4), (3, 3), (3, 7), (7, 8), (5, 6), (6, STEPS)):
        train(killed, first, last, torn='{"event": "st')
    assert learnt(killed) == learnt(whole)
    assert [e["event"] for e in learnt(whole)].count("step") == STEPS
    starts = [e["step"] for e in read_journal(killed / "journal.jsonl") if e["event"] == "start"]
    assert starts == [0, 0, 2, 2, 6, 4, 5]


def test_a_journal_that_has_nothing_to_cut_is_not_written_again(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    journal.cut(0)
    assert not journal.path.exists()
    journal.write("start")
    journal.write("step", step=1)
    before = journal.path.stat().st_ino
    journal.cut(1)
    assert journal.path.stat().st_ino == before
    journal.cut(0)
    assert [e["event"] for e in read_journal(journal.path)] == ["start"]


def test_a_line_of_a_journal_that_is_no_event_is_named(tmp_path: Path) -> None:
    (tmp_path / "journal.jsonl").write_text('{"event": "start"}\n\0\0\0\n')
    with pytest.raises(ValueError, match=r"journal\.jsonl, line 2: not JSON"):
        read_journal(tmp_path / "journal.jsonl")


@pytest.mark.usefixtures("nothing_drawn")
def test_tensorboard_has_every_number_of_the_journal_and_after_a_resume_each_once(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tmp_path, last=5, tensorboard=True)
    train(tmp_path, first=4, tensorboard=True)
    found = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    expected: dict[str, list[tuple[int, float]]] = {}
    for event in read_journal(tmp_path / "journal.jsonl"):
        if event["event"] == "step":
            numbers = {k: v for k, v in (event | event.pop("machine")).items() if k not in ("event", "time", "step")}
        elif event["event"] == "evaluation":
            numbers = {f"{name}/{w}": a for name, part in event["accuracy"].items() for w, a in part.items()}
        else:
            continue
        for name, value in numbers.items():
            expected.setdefault(name, []).append((event["step"], value))
    tags = {
        tag.split("/", 1)[1].removeprefix("machine/").removeprefix("accuracy/"): tag for tag in found.Tags()["scalars"]
    }
    assert tags.keys() - {"anchor_weight"} == expected.keys()
    assert len(expected["loss"]) == STEPS
    for name, points in expected.items():
        scalars = found.Scalars(tags[name])
        assert [s.step for s in scalars] == [step for step, _ in points]
        assert [s.value for s in scalars] == pytest.approx([value for _, value in points])  # float32 there


def test_tensorboard_that_is_not_installed_is_named_before_the_run_with_what_installs_it(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(monitor, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install tensorboard"):
        Monitor(None, RunFolder(tmp_path), STEPS, 4, tensorboard=True)
    Monitor(None, RunFolder(tmp_path), STEPS, 4, tensorboard=False)


@pytest.mark.usefixtures("nothing_drawn")
def test_tensorboard_is_imported_only_when_it_is_asked_for(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    train(tmp_path)


@pytest.mark.usefixtures("nothing_drawn")
def test_speed_and_waiting_are_those_of_the_steps_and_a_pause_is_none_of_them(tmp_path: Path, clock) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    with Monitor(journal, RunFolder(tmp_path), STEPS, 4, tensorboard=False) as seen:
        for step in (1, 2):
            clock.now += 2.0
            seen.step(step, values(step), waited_s=0.5)
            with seen.paused():
                clock.now += 100.0
    machines = [event["machine"] for event in read_journal(journal.path)]
    assert [(m["clips_per_s"], m["waiting"]) for m in machines] == [(2.0, 0.25)] * 2
    assert machines[0]["memory_gb"] == pytest.approx(monitor.peak_memory_gb(), rel=0.2)


@pytest.mark.usefixtures("nothing_drawn")
def test_a_resumed_run_has_its_own_speed_and_the_time_that_is_left(tmp_path: Path, clock, monkeypatch) -> None:
    log = io.StringIO()
    monkeypatch.setattr(monitor, "progress_bar", lambda unit: progress.progress_bar(Console(file=log), unit))
    with Monitor(None, RunFolder(tmp_path), 1000, 4, tensorboard=False) as seen:
        seen._progress.get_time = lambda: clock.now
        for step in range(901, 941):
            clock.now += 1.0
            seen.step(step, values(step), waited_s=0.25)
    line = log.getvalue().splitlines()[0]
    assert line.startswith("fine-tuning: 3720 of 4000 clips, 4 clips/s, 0:01:10 left; loss 0.001 and 0.002, ")
    assert "learning rate 0.001, 25% waiting for data, " in line


def test_details_stand_below_a_bar_of_a_terminal() -> None:
    screen = io.StringIO()
    with progress.progress_bar(Console(file=screen, force_terminal=True, width=90), "clips") as bar:
        bar.update(bar.add_task("fine-tuning", total=8), completed=4, details="loss 0.5")
    _, bar_drawn, below = screen.getvalue().rpartition("4/8")
    assert bar_drawn
    assert "loss 0.5" in below.partition("\n")[2]


def test_curves_are_drawn_as_it_runs_and_at_the_end(tmp_path: Path, clock) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    folder = RunFolder(tmp_path)
    with Monitor(journal, folder, STEPS, 4, tensorboard=False) as seen:
        seen.step(1, values(1), waited_s=0.0)
        assert seen._drawing is None
        clock.now += 31.0
        seen.step(2, values(2), waited_s=0.0)
        first = seen._drawing
        assert first is not None
        clock.now += 1.0
        seen.step(3, values(3), waited_s=0.0)
        assert seen._drawing is first, "one at a time"
        first.wait()
        with Image.open(folder.curves) as picture:
            assert min(picture.size) > 200
        drawn = folder.curves.stat().st_mtime_ns
    assert folder.curves.stat().st_mtime_ns > drawn
    assert {path.name for path in tmp_path.iterdir()} == {"journal.jsonl", "curves.png"}


def test_what_went_wrong_is_told_before_the_picture_is_drawn(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    seen = Monitor(Journal(folder.journal), folder, STEPS, 4, tensorboard=False)
    seen.__enter__()
    seen.step(1, values(1), waited_s=0.0)
    seen.__exit__(FloatingPointError)
    assert not folder.curves.exists()  # it takes seconds to begin to draw
    with monitor._left_to_draw.pop() as drawing:
        assert drawing.wait(timeout=300) == 0
    assert folder.curves.exists()


def test_a_picture_that_cannot_be_drawn_is_told_and_stops_nothing(tmp_path: Path, capsys) -> None:
    (tmp_path / "curves.png").mkdir()
    train(tmp_path)
    assert "curves.png could not be drawn: IsADirectoryError" in capsys.readouterr().out


@pytest.mark.parametrize("events", [[], [values(1)], [{"loss": math.nan}, {"loss": 1.0}, {"loss": math.inf}]])
def test_few_steps_and_strange_ones_are_drawn(tmp_path: Path, events: list[dict[str, float]]) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    journal.write("start")
    for step, event in enumerate(events, start=1):
        journal.write("step", step=step, **event)
    curves.draw(journal.path, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 0


def test_a_resume_is_marked_where_the_steps_of_another_process_begin() -> None:
    def step(n: int) -> dict[str, Any]:
        return {"event": "step", "step": n}

    start = {"event": "start", "step": 9}  # from a checkpoint that was given up for one further back
    events = [start, step(1), step(2), start, start, step(3), start, step(4)]
    assert list(curves._resumed(events)) == [2, 2, 3]
