"""The commands as a user runs them, on a corner of the miniature world and on all of it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from applications.openvclip import build, distributed, evaluate, train
from applications.openvclip.commands import predict
from applications.openvclip.config import from_dict
from applications.openvclip.data.decode import Video, VideoReadError
from applications.openvclip.data.layouts import read_dataset
from applications.openvclip.miniature import tiny_clip
from applications.openvclip.model.classifier import class_embeddings
from applications.openvclip.model.prompts import OBJECT_TEMPLATES
from applications.openvclip.model.video_encoder import VideoEncoder
from applications.openvclip.runs.journal import read_journal
from applications.openvclip.runs.lock import LockedError, locked
from interpolate import WeightMismatchError, patch_files
from tests.openvclip.files import cut_off, write_manifest


def arguments(small_world: dict[str, Path], output: Path, *more: str) -> list[str]:
    """A run of 3 epochs of 4 steps, averaged from the second epoch on."""
    return [
        *("miniature", "--output", str(output), "--data.train", str(small_world["train"])),
        *("--data.test", str(small_world["closed"]), str(small_world["zs_object"])),
        *("--optimization.batch-size", "4", "--averager.start-epoch", "1", "--data.workers", "1"),
        *("--evaluation.anchor-weights", "0", "0.5", "1", *more),
    ]


@pytest.fixture(scope="module")
def run(small_world: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "first"
    train.main(arguments(small_world, folder))
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "averaged.safetensors")


def assert_same_weights(a: Path, b: Path) -> None:
    assert all(torch.equal(tensor, weights(b)[name]) for name, tensor in weights(a).items())


def test_a_run_leaves_its_results_and_how_they_were_made(run: Path) -> None:
    results = json.loads((run / "results.json").read_text())
    assert results["anchor_weight"] == 0.5
    assert results["protocols"]["closed"]["closed"] is True
    zero_shot = results["protocols"]["zs_object"]
    assert zero_shot["closed"] is False
    assert zero_shot["videos"] == 24
    assert zero_shot["unreadable"] == {}
    assert len(zero_shot["hash"]) == 16
    paths = {"0", "0.5", "1"}
    assert zero_shot["accuracy"].keys() == {"CLIP*", *paths, *(f"last {weight}" for weight in paths)}
    assert zero_shot["accuracy"]["1"] == zero_shot["accuracy"]["last 1"]
    assert results["config"]["optimization"]["batch_size"] == 4
    assert results["provenance"]["versions"]["torch"]
    assert (run / "tradeoff.png").read_bytes().startswith(b"\x89PNG")
    events = [event["event"] for event in read_journal(run / "journal.jsonl")]
    assert events == ["start", *["step"] * 12, "checkpoint", "end"]


@pytest.mark.slow
def test_videos_that_were_replaced_or_cut_off_are_told_once(small_world, tmp_path: Path, capsys) -> None:
    whole = read_dataset(str(small_world["train"]))
    paths = [whole.location(0), whole.location(1), str(cut_off(tmp_path / "cut.avi")), str(tmp_path / "absent.mp4")]
    small = write_manifest(tmp_path / "train.csv", [(path, whole.classes[0]) for path in paths])
    train.main(arguments({**small_world, "train": small}, tmp_path / "run"))
    faults = [e for e in read_journal(tmp_path / "run" / "journal.jsonl") if e["event"] in ("unreadable", "cut-off")]
    assert sorted((e["event"], e["video"]) for e in faults) == [("cut-off", paths[2]), ("unreadable", paths[3])]
    shown = capsys.readouterr().out
    assert "1 videos could not be read and were replaced by others: see" in shown
    assert "1 videos are cut off and were used as far as they go: see" in shown


def test_the_patched_weights_are_the_interpolation(run: Path, source) -> None:
    patched = load_file(run / "patched.safetensors")
    anchor = source.clip.state_dict()
    assert patched.keys() == weights(run).keys() == anchor.keys()
    assert (run / "patched.safetensors").stat().st_mode == (run / "config.json").stat().st_mode  # as the umask has it
    for name, theta in weights(run).items():
        torch.testing.assert_close(patched[name], 0.5 * anchor[name] + 0.5 * theta)


def test_weights_of_a_run_are_whole_clips_that_load_and_mix_like_the_pretrained_file(run: Path, tmp_path: Path) -> None:
    clip = tiny_clip.load_pretrained(torch.device("cpu")).clip
    clip.load_state_dict(load_file(run / "patched.safetensors"), strict=True)
    patch_files(tiny_clip.WEIGHTS, run / "averaged.safetensors", tmp_path / "out.safetensors", anchor_weight=0.5)
    mixed = load_file(tmp_path / "out.safetensors")
    for name, tensor in load_file(run / "patched.safetensors").items():
        assert torch.equal(mixed[name], tensor), name


def test_the_accuracies_are_those_of_the_weights_that_they_are_said_to_be_of(
    run: Path, small_world: dict[str, Path], source
) -> None:
    """Evaluated once more without any of the evaluation's code: one video, one model at a time."""
    manifest = read_dataset(str(small_world["closed"]))
    clip = tiny_clip.load()
    classes = class_embeddings(clip, source.tokenizer, manifest.classes, OBJECT_TEMPLATES)
    tuned = tiny_clip.load()
    temporal = VideoEncoder(tuned)
    frames = [Video(Path(manifest.location(i)), 32).frames([1, 5, 9, 13]) for i in range(len(manifest))]
    videos = [(torch.from_numpy(f).float() / 255 - 0.5).div(0.25).permute(0, 3, 1, 2) for f in frames]

    def accuracy(score: Callable[[torch.Tensor], torch.Tensor]) -> float:
        pairs = zip(videos, manifest.labels, strict=True)
        return sum(int(score(video).argmax()) == label for video, label in pairs) / len(manifest)

    def frame_by_frame(video: torch.Tensor) -> torch.Tensor:
        return (clip.encode_image(video, normalize=True) @ classes.T).mean(dim=0)

    def over_frames(video: torch.Tensor) -> torch.Tensor:
        return temporal(video.transpose(0, 1).unsqueeze(0), classes)[0]

    results = json.loads((run / "results.json").read_text())["protocols"]["closed"]
    reported = {scorer: accuracies["top-1"][0] for scorer, accuracies in results["accuracy"].items()}
    with torch.no_grad():
        assert reported["CLIP*"] == pytest.approx(accuracy(frame_by_frame))
        assert reported["1"] == pytest.approx(accuracy(over_frames))
        tuned.load_state_dict(weights(run))
        assert reported["0"] == pytest.approx(accuracy(over_frames))
        tuned.load_state_dict(load_file(run / "patched.safetensors"))
        assert reported["0.5"] == pytest.approx(accuracy(over_frames))
    assert reported["CLIP*"] != reported["0"]


def test_the_same_seed_gives_the_same_bits(run: Path, small_world: dict[str, Path], tmp_path: Path) -> None:
    train.main(arguments(small_world, tmp_path / "second"))
    assert_same_weights(run, tmp_path / "second")


@pytest.mark.slow
def test_a_killed_run_goes_on_as_if_it_had_never_stopped(
    run: Path, small_world: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "killed"
    command = [sys.executable, "-m", "applications.openvclip.train", *arguments(small_world, folder)]
    command += ["--checkpoint.every-steps", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # sums depend on it
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    while not list(folder.glob("checkpoints/step-*")):
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / "results.json").exists()
    with (folder / "journal.jsonl").open("a") as torn:
        torn.write('{"event": "st')
    moved = tmp_path / "moved"
    shutil.copytree(small_world["train"].parent, moved)
    monkeypatch.chdir(tmp_path)
    train.main(["--resume", "killed", "--data.workers", "2", "--data.train", str(moved / "manifest.csv")])
    events = read_journal(folder / "journal.jsonl")
    (resumed,) = (e["changed"] for e in events if e["event"] == "start" and e["changed"])
    assert [text.partition(":")[0] for text in resumed] == ["output", "data.train", "data.workers"]
    assert_same_weights(run, folder)


def test_a_run_can_be_evaluated_again_at_other_anchor_weights(run: Path) -> None:
    before = json.loads((run / "results.json").read_text())["protocols"]["zs_object"]
    evaluate.main([str(run), "--anchor-weights", "0.25", "1"])
    after = json.loads((run / "results.json").read_text())["protocols"]["zs_object"]
    weights = {"0", "0.25", "0.5", "1"}
    assert after["accuracy"].keys() == {"CLIP*", *weights, *(f"last {weight}" for weight in weights)}
    assert after["hash"] == before["hash"]
    for scorer in ("CLIP*", "0", "0.5", "1"):
        assert after["accuracy"][scorer] == before["accuracy"][scorer]


def test_evaluating_again_needs_no_training_videos_and_replaces_the_protocols(
    run: Path, small_world: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(run, tmp_path / "moved")
    config = json.loads((folder / "config.json").read_text())
    config["data"]["train"] = str(tmp_path / "gone.csv")
    (folder / "config.json").write_text(json.dumps(config))
    evaluate.main([str(folder), "--anchor-weights", "1"])
    assert json.loads((folder / "results.json").read_text())["protocols"]["closed"]["closed"] is True
    content = {"name": "mine", "parts": [{"source": str(small_world["zs_object"])}], "templates": "objects"}
    (tmp_path / "mine.json").write_text(json.dumps(content | {"sampling": {"frames": 2, "stride": 4, "views": 1}}))
    evaluate.main([str(folder), "--protocols", str(tmp_path / "mine.json")])
    assert json.loads((folder / "results.json").read_text())["protocols"].keys() == {"mine"}


def test_weights_from_another_anchor_are_refused(run: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((run / "config.json").read_text())
    with pytest.raises(FileNotFoundError, match="nothing is learnt"):
        evaluate.main([str(tmp_path)])
    save_file(weights(run), tmp_path / "averaged.safetensors", {"anchor": "0123"})
    with pytest.raises(WeightMismatchError, match="fingerprint 0123"):
        evaluate.main([str(tmp_path)])


def test_weights_of_another_architecture_are_refused(run: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((run / "config.json").read_text())
    with safe_open(run / "averaged.safetensors", framework="pt") as file:
        metadata = file.metadata()
    others = weights(run) | {"visual.conv1.weight": torch.zeros(128, 3, 16, 16)}
    save_file(others, tmp_path / "averaged.safetensors", metadata)
    with pytest.raises(WeightMismatchError, match=r"visual\.conv1\.weight: theta \(128, 3, 16, 16\), anchor"):
        evaluate.main([str(tmp_path)])


def test_a_folder_without_a_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is no folder of a run"):
        evaluate.main([str(tmp_path)])


def test_a_folder_of_runs_is_told_which_there_are(run: Path, tmp_path: Path) -> None:
    for i, name in enumerate(("older", "newer")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text((run / "config.json").read_text())
        (tmp_path / name / "journal.jsonl").touch()
        os.utime(tmp_path / name / "config.json", (i, i))
    told = f"it holds runs, give one of them: {tmp_path / 'newer'}, {tmp_path / 'older'}"
    with pytest.raises(FileNotFoundError, match=told):
        evaluate.main([str(tmp_path)])
    with pytest.raises(FileNotFoundError, match=told):
        predict.main(["clip.mp4", "--labels", "cloud", "--run", str(tmp_path)])


def test_a_run_that_is_evaluated_on_nothing_says_so(run: Path, tmp_path: Path, capsys) -> None:
    shutil.copytree(run, tmp_path / "run")
    settings = json.loads((run / "config.json").read_text())
    settings["data"]["test"] = []
    (tmp_path / "run" / "config.json").write_text(json.dumps(settings))
    evaluate.main([str(tmp_path / "run")])
    assert "nothing was evaluated" in capsys.readouterr().out


def test_training_on_nothing_but_corrupt_videos_ends_with_their_name(
    small_world: dict[str, Path], tmp_path: Path
) -> None:
    for i in range(4):
        (tmp_path / f"broken{i}.mp4").write_bytes(b"\x00" * 100)
    train_set = write_manifest(tmp_path / "m.csv", [(f"broken{i}.mp4", "cloud") for i in range(4)])
    with pytest.raises(VideoReadError, match=r"none of 10 videos in a row .*broken\d\.mp4: 100 bytes, not a readable"):
        train.main(arguments(small_world, tmp_path / "run", "--data.train", str(train_set)))


def test_an_unknown_model_is_named(small_world: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'ViT-B-61' is neither 'miniature' nor a model of open_clip"):
        train.main(arguments(small_world, tmp_path / "run", "--model.name", "ViT-B-61"))


@pytest.mark.slow
def test_the_miniature_gains_closed_accuracy_and_keeps_the_open_vocabulary(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "applications.openvclip.train", "--output", str(tmp_path / "run")], check=True
    )
    found = json.loads((tmp_path / "run" / "results.json").read_text())["protocols"]
    baseline, unpatched, patched = (
        {name.removeprefix("miniature/"): result["accuracy"][scorer]["top-1"][0] for name, result in found.items()}
        for scorer in ("CLIP*", "0", "0.5")
    )
    assert patched["closed"] > baseline["closed"] + 0.2
    assert sum(patched[name] > baseline[name] for name in ("zs_object", "zs_motion", "zs_colour")) >= 2
    assert unpatched["images"] < baseline["images"] - 0.1
    assert patched["images"] > unpatched["images"] + 0.05


def test_a_resumed_run_on_other_videos_is_refused(run: Path, small_world: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "unfinished"
    shutil.copytree(run, folder)
    (folder / "results.json").unlink()
    settings = (folder / "config.json").read_text()
    with pytest.raises(ValueError, match="begun with other videos"):
        train.main(["--resume", str(folder), "--data.train", str(small_world["closed"])])
    assert (folder / "config.json").read_text() == settings, "it still goes on with its own"


def test_processes_with_other_settings_are_refused_by_the_names_of_these(
    small_world: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "gathered", lambda facts: [facts, facts | {"optimization.epochs": 7}])
    with pytest.raises(ValueError, match=r"differ in optimization\.epochs: 3 on rank 0, 7 on rank 1\.$"):
        train.main(arguments(small_world, tmp_path / "run"))


def test_a_folder_in_use_is_named_with_its_holder(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "unfinished"
    shutil.copytree(run, folder)
    with locked(folder), pytest.raises(LockedError, match=f"in use by process {os.getpid()}"):
        evaluate.main([str(folder)])
    (folder / "results.json").unlink()
    with locked(folder), pytest.raises(LockedError, match=f"in use by process {os.getpid()}"):
        train.main(["--resume", str(folder)])


def test_sets_of_one_name_are_told_apart_and_protocols_of_one_name_refused(
    run: Path, small_world: dict[str, Path], tmp_path: Path
) -> None:
    for folder in ("a", "b"):
        shutil.copytree(small_world["closed"].parent, tmp_path / folder / "val")
    sets = [str(tmp_path / folder / "val" / "manifest.csv") for folder in ("a", "b")]
    config = from_dict(json.loads((run / "config.json").read_text()))
    found = build.protocols(replace(config, data=replace(config.data, test=tuple(sets))), read_dataset(sets[0]).classes)
    assert [p.name for p in found] == sets
    assert all(p.closed for p in found)
    (tmp_path / "p.json").write_text(
        json.dumps({"name": "mine", "parts": [{"source": sets[0]}], "templates": "objects"})
    )
    (tmp_path / "q.json").write_text(
        json.dumps({"name": "mine", "parts": [{"source": sets[1]}], "templates": "objects"})
    )
    with pytest.raises(ValueError, match="mine: several sets or protocols of this name"):
        evaluate.main([str(run), "--protocols", str(tmp_path / "p.json"), str(tmp_path / "q.json")])
