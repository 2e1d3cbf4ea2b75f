"""A run that was stopped can be finished where it is, evaluated as it is, and extended."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from applications.openvclip import Classifier, evaluate, train
from applications.openvclip.commands.model_options import notice
from applications.openvclip.runs.journal import read_journal
from applications.openvclip.training.checkpoints import Checkpoints
from tests.openvclip.test_commands import arguments

pytestmark = pytest.mark.slow


def trained(small_world: dict[str, Path], folder: Path, *more: str) -> Path:
    train.main(arguments(small_world, folder, *more))
    return folder


def assert_same(a: Path, b: Path) -> None:
    for kind in ("last", "averaged"):
        expected, found = (load_file(folder / f"{kind}.safetensors") for folder in (a, b))
        assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


def accuracies(folder: Path) -> dict:
    return {name: r["accuracy"] for name, r in json.loads((folder / "results.json").read_text())["protocols"].items()}


def test_a_run_is_extended_by_resuming_with_more_epochs(small_world: dict[str, Path], tmp_path: Path) -> None:
    whole = trained(small_world, tmp_path / "whole")
    extended = trained(small_world, tmp_path / "extended", "--optimization.epochs", "2")
    early = accuracies(extended)
    train.main(["--resume", str(extended), "--optimization.epochs", "3"])
    assert_same(whole, extended)
    assert accuracies(extended) == accuracies(whole)
    assert early.keys() == accuracies(whole).keys()
    starts = [e for e in read_journal(extended / "journal.jsonl") if e["event"] == "start"]
    assert [(e["step"], e["changed"]) for e in starts] == [(0, []), (8, ["optimization.epochs: 2, now 3"])]
    with pytest.raises(
        ValueError, match=r"--optimization\.epochs: the run has taken 12 steps, and there are 8 of them"
    ):
        train.main(["--resume", str(extended), "--optimization.epochs", "2"])


def test_the_best_weights_on_the_way_are_left_beside_the_last(
    small_world: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_best = Checkpoints.keep_best
    monkeypatch.setattr(Checkpoints, "keep_best", lambda self, step, value: keep_best(self, step, -step))
    early = trained(small_world, tmp_path / "early", "--averager.start-epoch", "0", "--optimization.epochs", "1")
    options = ("--averager.start-epoch", "0", "--in-training.every-epochs", "1", "--checkpoint.keep", "1")
    whole = trained(small_world, tmp_path / "whole", *options)
    expected, found = load_file(early / "averaged.safetensors"), load_file(whole / "best.safetensors")
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
    assert expected.keys() == found.keys()
    assert not (early / "best.safetensors").exists()


def test_a_damaged_best_checkpoint_does_not_cost_the_final_model(
    small_world: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_best = Checkpoints.keep_best

    def damaged(self: Checkpoints, step: int, value: float) -> None:
        keep_best(self, step, -step)
        next((self.folder / "step-00000004").glob("*.safetensors")).write_bytes(b"torn")

    monkeypatch.setattr(Checkpoints, "keep_best", damaged)
    options = ("--optimization.epochs", "2", "--in-training.every-epochs", "1")
    with pytest.warns(UserWarning, match=r"best\.safetensors is left out: .*step-00000004 is damaged"):
        run = trained(small_world, tmp_path, *options)
    assert (run / "results.json").exists()
    assert not (run / "best.safetensors").exists()


def test_a_schedule_that_ends_somewhere_can_not_be_extended(small_world: dict[str, Path], tmp_path: Path) -> None:
    trained(small_world, tmp_path, "--optimization.epochs", "2", "--optimization.schedule", "cosine")
    with pytest.raises(FileExistsError, match=r"another configuration \(optimization\.epochs: 2, now 3\)"):
        train.main(["--resume", str(tmp_path), "--optimization.epochs", "3"])


def test_a_stopped_run_is_evaluated_and_finished_where_it_is(
    small_world: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    ended = trained(small_world, tmp_path / "ended", "--optimization.epochs", "2")
    stopped = tmp_path / "stopped"
    (ended / "checkpoints").rename(tmp_path / "checkpoints")
    config = json.loads((ended / "config.json").read_text())
    config["optimization"]["epochs"], config["output"] = 3, str(stopped)  # as if stopped after two
    stopped.mkdir()
    (tmp_path / "checkpoints").rename(stopped / "checkpoints")
    (stopped / "config.json").write_text(json.dumps(config))
    (stopped / "journal.jsonl").write_text((ended / "journal.jsonl").read_text())
    evaluate.main([str(stopped)])
    assert "has not ended: evaluated is what it had at its last checkpoint, step 8." in capsys.readouterr().out
    assert accuracies(stopped) == accuracies(ended)
    told = f"{stopped} has not ended: what answers is what it had at its last checkpoint, step 8."
    assert told in (notice(Classifier.load(stopped)) or "")
    assert "has not ended" not in (notice(Classifier.load(ended)) or "")
    train.main(["--resume", str(stopped), "--finish"])
    assert "the run ends at step 8 of 12, with a mean of " in capsys.readouterr().out
    assert_same(ended, stopped)
    assert accuracies(stopped) == accuracies(ended)
    train.main(["--resume", str(stopped)])  # and it can still go on
    assert len([e for e in read_journal(stopped / "journal.jsonl") if e["event"] == "step"]) == 12
    with pytest.raises(FileExistsError, match="holds a finished run"):
        train.main(["--resume", str(stopped)])
    with pytest.raises(ValueError, match="say which with --resume RUN"):
        train.main(["--finish"])
