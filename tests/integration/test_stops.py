"""Being told to stop: a run saves, says how it goes on, and goes on; on other numbers of processes too."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from applications.openvclip.miniature import tiny_clip
from applications.openvclip.runs.journal import read_journal
from applications.openvclip.training.checkpoints import Checkpoints
from tests.integration.runs import (
    TIME_LIMIT_S,
    arguments,
    differences,
    family,
    finished,
    n_starts,
    n_steps,
    outcome,
    ranks,
    running,
    wait_for_steps,
)
from tests.openvclip.steps import distance_as_seen

pytestmark = pytest.mark.slow

LONG = ("--optimization.epochs", "1000")
SHORT = ("--optimization.epochs", "4")


@pytest.fixture(scope="module")
def whole(small_world: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run on one process that was never stopped."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    finished(arguments(small_world, folder, *SHORT))
    return folder


def stopped(command: list[str], folder: Path, number: signal.Signals, n: int = 1, after: int = 3) -> str:
    """What a run prints that is sent a signal after a few steps."""
    start = n_starts(folder) + 1
    with running(command, n) as run:
        wait_for_steps(run, folder, after, start=start)
        run.send_signal(number)
        printed = run.communicate(timeout=TIME_LIMIT_S)[0]
    assert run.returncode == 0 or n > 1, printed  # torchrun itself ends with the signal
    return printed


def steps_taken(folder: Path) -> int:
    return [event["step"] for event in read_journal(folder / "journal.jsonl") if event["event"] == "step"][-1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_ends_the_step_saves_and_says_how_it_goes_on(
    small_world: dict[str, Path], tmp_path: Path, number: signal.Signals
) -> None:
    printed = stopped(arguments(small_world, tmp_path / "run", *LONG), tmp_path / "run", number)
    assert f"stopped by {number.name}" in printed
    assert f"openvclip train --resume {tmp_path / 'run'}" in printed
    assert Checkpoints(tmp_path / "run" / "checkpoints", keep=1).newest() == steps_taken(tmp_path / "run")
    assert not (tmp_path / "run" / ".lock").exists()


def test_the_second_signal_ends_at_once(small_world: dict[str, Path], tmp_path: Path) -> None:
    """Also where the step will never end: its reading process has been stopped."""
    command = arguments(small_world, tmp_path / "run", *LONG, "--data.time-limit-s", "3000")
    with running(command) as run:
        wait_for_steps(run, tmp_path / "run", 2)
        for pid in family(run.pid)[1:]:
            os.kill(pid, signal.SIGSTOP)
        taken = -1
        while taken != (taken := n_steps(tmp_path / "run")):  # what had been read already
            time.sleep(10)
        run.send_signal(signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):
            run.wait(5)
        run.send_signal(signal.SIGTERM)
        assert run.wait(TIME_LIMIT_S) == 128 + signal.SIGTERM


def test_saved_on_two_resumed_on_one_and_back_ends_where_one_would(
    small_world: dict[str, Path], tmp_path: Path, whole: Path
) -> None:
    """The order of sums differs, and nothing else."""
    folder = tmp_path / "run"
    command = arguments(small_world, folder, *SHORT)
    for n in (2, 1):
        stopped(command, folder, signal.SIGTERM, n)
    assert 0 < n_steps(folder) < 16
    printed = finished(command, 2)
    assert f"run: {folder}" in printed
    expected, found = outcome(whole), outcome(folder)
    assert [event["step"] for event in found["journal"] if event["event"] == "step"] == list(range(1, 17))
    moved = distance_as_seen(expected["last"], tiny_clip.load().state_dict())
    for name in ("last", "averaged"):
        assert distance_as_seen(found[name], expected[name]) < 5e-5 * moved  # 1.1e-5 has been seen


def test_torchrun_restarts_what_died_and_it_goes_on_by_itself(small_world: dict[str, Path], tmp_path: Path) -> None:
    finished(arguments(small_world, tmp_path / "whole", *SHORT), 2)
    folder = tmp_path / "run"
    with running(arguments(small_world, folder, *SHORT), 2, "--max-restarts", "1") as run:
        wait_for_steps(run, folder, 5)
        os.kill(ranks(run)[1], signal.SIGKILL)
        printed = run.communicate(timeout=TIME_LIMIT_S)[0]
    assert run.returncode == 0, printed
    assert [event["event"] for event in read_journal(folder / "journal.jsonl")].count("start") == 2
    assert not differences(outcome(tmp_path / "whole"), outcome(folder))
