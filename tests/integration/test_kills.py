"""A run that is killed, as often as you like, ends as the run that never was."""

import random
import time
from pathlib import Path

import pytest

from tests.integration import loop
from tests.integration.runs import arguments, differences, finished, killed, n_starts, n_steps, outcome

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("n", [1, 2])
def test_twenty_kills_of_the_loop_change_nothing(tmp_path: Path, n: int) -> None:
    """Some of them before the first step, some within a step, most within the writing of a checkpoint."""
    steps, generator, unfinished = 300, random.Random(n), 0
    assert loop.Processes(n, tmp_path / "whole", steps, 0).wait() == [0] * n
    folder = tmp_path / "killed"
    for i in range(20):
        before = n_starts(folder)
        run = loop.Processes(n, folder, steps, 0.02)
        how = generator.choice(["starting", "training", "writing", "writing"])
        while how != "starting" and n_starts(folder) == before and run.are_running():
            time.sleep(0.005)
        wanted = generator.randint(2, 8)
        while how != "starting" and n_steps(folder) < wanted and run.are_running():
            time.sleep(0.005)
        while how == "writing" and not list((folder / "checkpoints").glob(".interpolate-*")) and run.are_running():
            time.sleep(0.0002)
        time.sleep(generator.uniform(0, {"starting": 0.5, "training": 0.1, "writing": 0.02}[how]))
        assert run.are_running(), (folder / "output-0.txt").read_text()
        run.kill()
        run.wait()
        unfinished += bool(list((folder / "checkpoints").glob(".interpolate-*")))
        print(i, how, n_steps(folder), unfinished)
    assert loop.Processes(n, folder, steps, 0).wait() == [0] * n
    assert unfinished > 3, "kills are to come within the writing of checkpoints"
    assert loop.learnt(folder) == loop.learnt(tmp_path / "whole")


@pytest.mark.parametrize("n", [1, 2])
def test_kills_of_a_whole_run_change_nothing(small_world: dict[str, Path], tmp_path: Path, n: int) -> None:
    finished(arguments(small_world, tmp_path / "whole", "--optimization.epochs", "8"), n)
    broken = arguments(small_world, tmp_path / "killed", "--optimization.epochs", "8")
    came = killed(broken, tmp_path / "killed", 3, n, random.Random(n))
    assert not differences(outcome(tmp_path / "whole"), outcome(tmp_path / "killed")), came
