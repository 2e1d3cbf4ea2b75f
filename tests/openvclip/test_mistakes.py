"""What a user gets wrong is found before the first video and told in one line; a fault of the program is traced."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from applications.openvclip.__main__ import is_mistake, main
from applications.openvclip.commands import train
from applications.openvclip.config import to_dict
from applications.openvclip.data.manifest import Manifest
from applications.openvclip.runs.folder import RunFolder
from tests.openvclip.test_commands import arguments


def refused(arguments: list[str], capsys: pytest.CaptureFixture) -> str:
    """What a command says that ends with exit code 2."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        (["--averager.start-epoch", "3"], "--averager.start-epoch: 3 leaves nothing to average"),
        (["--averager.snapshots-per-epoch", "0"], "--averager.snapshots-per-epoch: must be at least 1, got 0"),
        (["--evaluation.anchor-weight", "1.5"], "--evaluation.anchor-weight: must be in [0, 1], got 1.5"),
        (["--evaluation.anchor-weights", "0", "nan"], "--evaluation.anchor-weights: must be in [0, 1], got nan"),
        (["--optimization.batch-size", "17"], "--optimization.batch-size: must be at most 16, the videos of"),
        (
            ["--optimization.micro-batch", "0"],
            "--optimization.micro-batch: must be a divisor of the batch of 4 clips, got 0",
        ),
        (["--optimization.epochs", "0"], "--optimization.epochs: must be at least 1, got 0"),
        (["--seed", "-1"], "--seed: must be at least 0, got -1"),
        (["--optimization.learning-rate", "nan"], "--optimization.learning-rate: must be positive and finite, got nan"),
        (["--regularizer.max-alpha", "1"], "--regularizer.max-alpha: must be in [0, 1), got 1"),
        (
            ["--augmentation.max-short-side", "0.5"],
            "--augmentation.max-short-side: must be finite and at",
        ),
        (["--regularizer.every", "0"], "--regularizer.every: must be at least 1, got 0"),
        (["--teacher.decay", "1"], "--teacher.decay: must be in [0, 1), got 1"),
        (["--sampling.frames", "0"], "frames, views and stride must"),
        (["--data.workers", "0"], "--data.workers: must be at least 1, got 0"),
        (["--data.cache-gb", "inf"], "--data.cache-gb: must be positive and finite, got inf"),
        (["--data.train", "miniature:trian"], "miniature:trian: there is no such set"),
        (["--data.test", "absent.csv"], "absent.csv: no such file or folder"),
        (["--evaluation.protocols", "ucf101/EP9"], "'ucf101/EP9' is not a protocol"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_wrong_setting_is_named_before_the_first_video(
    small_world: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    setting: list[str],
    said: str,
) -> None:
    monkeypatch.setattr(Manifest, "location", lambda *_: pytest.fail("a video was asked for"))
    monkeypatch.setattr(train, "train", lambda *_: pytest.fail("training began"))
    monkeypatch.setattr("applications.openvclip.miniature.tasks.prepare", lambda seed: {"train": None})
    assert said in refused(["train", *arguments(small_world, tmp_path / "run", *setting)], capsys)
    assert not (tmp_path / "run").exists()


def test_another_seed_is_refused_before_its_videos_are_made(
    small_world: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.checkpoints.mkdir(parents=True)
    folder.write_settings(to_dict(train.parse(arguments(small_world, folder.path))))
    monkeypatch.setattr("applications.openvclip.training_run.data_set", lambda *_, **__: pytest.fail("videos are made"))
    said = refused(["train", "--resume", str(folder.path), "--seed", "5"], capsys)
    assert "a run of another configuration (seed: 0, now 5)" in said


def test_a_misspelt_protocol_is_named_before_weights_are_fetched(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("applications.openvclip.build.clip", lambda *_: pytest.fail("weights were asked for"))
    assert "'foo/EP9' is not a protocol" in refused(["evaluate", "--protocols", "foo/EP9"], capsys)


def test_tensorboard_that_is_not_installed_is_named_with_what_installs_it(
    small_world: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("applications.openvclip.training.monitor.find_spec", lambda name: None)
    said = refused(["train", *arguments(small_world, tmp_path / "run", "--tensorboard")], capsys)
    assert "pip install tensorboard" in said


def test_class_names_that_have_no_embedding_are_found_before_the_first_video(
    small_world: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "t.csv").write_text("path,label\na.mp4,zeppelin\n")
    said = refused(["train", *arguments(small_world, tmp_path / "run", "--data.test", str(tmp_path / "t.csv"))], capsys)
    assert "'zeppelin'" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["compare", "absent.json"], "absent.json"),
        (["compare", "broken.json"], "broken.json is not the results of an evaluation"),
        (["evaluate", "nowhere"], "nowhere is no folder of a run"),
        (["evaluate", "--model.name", "miniature"], "--protocols says what to evaluate on"),
        (["evaluate", "--model.name", "miniature", "--protocols", "broken.json"], "broken.json: not JSON"),
        (
            ["evaluate", "--model.name", "miniature", "--protocols", "a.json", "--anchor-weight", "2"],
            "--anchor-weight: ",
        ),
        (["inspect", "flat"], "flat"),
        (["inspect", "absent"], "absent: no such file or folder"),
        (["inspect", "s4://bucket/a.csv"], "s4://bucket/a.csv can't be opened by fsspec: Protocol not known: s4"),
        (
            ["evaluate", "--model.name", "miniature", "--protocols", "sets.json"],
            "miniature:nowhere: there is no such set; the miniature has train",
        ),
        (["trian"], "there is no 'trian'"),
        (["evaluate", "nowhere", "--weights", "other.pth"], "Unrecognized options: --weights"),
        (["train", "minature"], "minature"),
    ],
    ids=" ".join,
)
def test_a_mistake_ends_a_command_with_one_message_and_exit_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, given: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("broken.json").write_text("{")
    Path("sets.json").write_text('{"name": "a", "parts": [{"source": "miniature:nowhere"}]}')
    Path("flat").mkdir()
    Path("flat/a.mp4").write_bytes(b"")
    assert said in refused(given, capsys)


def test_the_doors_of_modules_tell_mistakes_too(tmp_path: Path) -> None:
    for module, *given in (["compare", "absent.json"], ["data", "inspect", "absent"]):
        command = [sys.executable, "-m", f"applications.openvclip.{module}", *given]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)


@pytest.mark.parametrize("error", [KeyError("a"), TypeError("b"), RuntimeError("c"), ValueError("d")])
def test_a_fault_of_the_program_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def wrong(arguments: list[str]) -> None:
        raise error

    monkeypatch.setattr(train, "main", wrong)
    with pytest.raises(type(error)):
        main(["train"])


def test_what_the_interpreter_refuses_inside_the_program_is_no_mistake() -> None:
    with pytest.raises(ValueError, match="zip") as found:
        Manifest("m", "", ("a.mp4",), (), ("cloud",)).of_classes({"cloud"}, "n")
    assert not is_mistake(found.value)


def test_a_reader_that_has_enough_ends_it_quietly() -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "applications.openvclip", "train", "--help"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")
