"""`--dry-run`: what it prints, and that it leaves nothing behind."""

import re
import tempfile
from unittest.mock import MagicMock

import pytest

from applications.openvclip.commands import train
from applications.openvclip.commands.dry_run import decoding_s
from applications.openvclip.data.decode import VideoReadError


def test_a_dry_run_says_what_the_whole_run_takes_and_leaves_nothing(small_world, tmp_path, monkeypatch, capsys) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    options = ["--optimization.batch-size", "4", "--optimization.micro-batch", "2", "--optimization.epochs", "10"]
    options += ["--data.train", str(small_world["train"]), "--data.test", str(small_world["closed"])]
    train.main(["miniature", "--dry-run", "--output", str(tmp_path / "run"), "--data.workers", "1", *options])
    printed = capsys.readouterr().out
    for line in (
        r"parameters: 0\.8 million trained, on 1 x ",
        r"a step: 4 clips in micro-batches of 2, 2 at once; fp32\n",
        r"memory counted, GB, by the clips at once: 1: 0\.0\d, 2: 0\.0\d, 4: 0\.0\d, 8: 0\.\d\d; \d+ GB have room",
        r"measured at 2: \d+\.\d\d GB ",
        r"speed: \S+ clips/s, \S+ s a step, \d+% of it waiting for clips\n",
        r"decoding: \d+ ms of CPU a clip; workers that keep up with the model: \d+ \(now 1, ",
        r"the whole run: 10 epochs, 40 steps, \S+ hours; costs \S+ (GPU|process) hours, evaluation not included\n",
    ):
        assert re.search(line, printed), (line, printed)
    of_multiprocessing = ("pymp-", "listener-")  # sockets that last as long as this process
    left = [path.name for path in tmp_path.rglob("*") if not path.name.startswith(of_multiprocessing)]
    assert left == ["temporary"]


def test_the_cost_of_a_clip_is_that_of_those_that_can_be_read() -> None:
    asked = []

    def read(key: tuple[int, int, int]) -> None:
        asked.append(key[1])
        if key[1] < 10:
            raise VideoReadError("nothing in it")

    clips = MagicMock(side_effect=read)
    clips.manifest.__len__.return_value = 100
    assert decoding_s(MagicMock(clips=clips)) >= 0
    assert asked == list(range(18))


def test_a_run_that_is_too_short_to_be_tried_is_named(small_world, tmp_path) -> None:
    options = ["--data.train", str(small_world["train"]), "--data.test", str(small_world["closed"])]
    with pytest.raises(ValueError, match="--dry-run takes 4 steps, and the whole run has 1"):
        train.main(
            [
                "miniature",
                "--dry-run",
                "--optimization.batch-size",
                "16",
                "--optimization.epochs",
                "1",
                "--averager.start-epoch",
                "0",
                *options,
            ]
        )
