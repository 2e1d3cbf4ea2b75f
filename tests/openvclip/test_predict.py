"""`openvclip predict`: videos and labels as people give them, as a table, JSON or CSV, as a whole or along time."""

import csv
import io
import json
import shutil
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from applications.openvclip import Classifier
from applications.openvclip.__main__ import main
from applications.openvclip.data import storage
from applications.openvclip.data.decode import Video
from applications.openvclip.data.manifest import read_manifest
from applications.openvclip.data.storage import Cache
from applications.openvclip.inference.labels import read_labels
from applications.openvclip.inference.many import find_videos
from applications.openvclip.inference.windows import Place, Windows, seconds
from tests.openvclip.files import cut_off, numbered, numbers, write_video


@pytest.fixture(scope="module")
def classes(small_world: dict[str, Path]) -> tuple[str, ...]:
    return read_manifest(small_world["zs_object"]).classes


@pytest.fixture(scope="module")
def folder(small_world: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Videos as people have them: whole, cut off, and none."""
    root = tmp_path_factory.mktemp("videos")
    manifest = read_manifest(small_world["zs_object"])
    (root / "deeper").mkdir()
    shutil.copy(manifest.location(0), root / "a.mp4")
    shutil.copy(manifest.location(4), root / "deeper" / "b.MP4")
    (root / "notes.txt").write_text("no video")
    (root / "text.mp4").write_text("no video")
    cut_off(root / "cut.avi")
    return root


def run(*arguments: str) -> int:
    """Run `openvclip predict` on the built-in model, and return its exit code."""
    try:
        main(["predict", *arguments, "--workers", "1"])
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def test_a_folder_is_looked_through_and_what_cannot_be_read_is_a_row_and_exit_code_1(
    folder: Path, classes: tuple[str, ...], capsys: pytest.CaptureFixture
) -> None:
    assert run(str(folder), str(folder / "absent.mp4"), "--labels", ",".join(classes), "--csv") == 1
    shown = capsys.readouterr()
    rows = list(csv.DictReader(io.StringIO(shown.out)))
    found: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        found.setdefault(str(Path(row["video"]).relative_to(folder)), []).append(row)
    assert list(found) == ["a.mp4", "cut.avi", "deeper/b.MP4", "text.mp4", "absent.mp4"]
    for name in ("a.mp4", "cut.avi", "deeper/b.MP4"):
        assert [row["rank"] for row in found[name]] == [str(i) for i in range(1, 7)]
        expected = Classifier.load(model="miniature").classify(folder / name, classes)
        assert {row["label"]: row["probability"] for row in found[name]} == {k: f"{p:.6f}" for k, p in expected.items()}
    assert "of the 60 frames that it announces are there" in found["cut.avi"][0]["fault"]
    assert found["a.mp4"][0]["fault"] == ""
    for name, reason in (("text.mp4", "8 bytes, not a readable video."), ("absent.mp4", "no such file.")):
        (row,) = found[name]
        assert (row["rank"], row["label"], row["probability"]) == ("", "", "")
        assert row["fault"].startswith(reason)
    assert "This is the miniature: a toy model" in shown.err
    assert "--model.name ViT-B-16 --model.pretrained openai" in shown.err


def test_the_table_has_the_best_labels_and_json_all(
    folder: Path, classes: tuple[str, ...], capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    video = str(folder / "a.mp4")
    assert run(video, "--labels", ",".join(classes), "--top", "2") == 0
    lines = capsys.readouterr().out.splitlines()
    assert run(video, "--labels", ",".join(classes), "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["model"], found["anchor_weight"]) == ("miniature", 1)
    (row,) = found["videos"]
    assert row["video"] == video
    best = list(row["labels"].items())[:2]
    assert lines[0].split() == ["video", "label", "%"]
    assert all(label in line for (label, _), line in zip(best, lines[1:], strict=True))
    assert video in lines[1]
    assert video not in lines[2]
    assert [line.split()[-1] for line in lines[1:]] == [f"{100 * p:.1f}" for _, p in best]


def test_a_url_that_cannot_be_opened_is_a_row(folder: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(str(folder / "a.mp4"), "foo://y.mp4", "--labels", "cloud", "--csv") == 1
    seen, not_opened = csv.DictReader(io.StringIO(capsys.readouterr().out))
    assert (seen["rank"], seen["fault"]) == ("1", "")
    assert (not_opened["video"], not_opened["rank"]) == ("foo://y.mp4", "")
    assert "Protocol not known: foo" in not_opened["fault"]


def test_what_a_server_says_that_is_no_error_of_the_system_costs_no_other_video(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class NoCredentialsError(Exception): ...

    def refuse(source: str) -> bool:
        raise NoCredentialsError

    monkeypatch.setattr(storage, "is_folder", refuse)
    assert find_videos(["s3://bucket/a.mp4", "b.mp4"]) == ["s3://bucket/a.mp4", "b.mp4"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--labels", "cloud", "--json", "--csv"], "--json and --csv: one of them"),
        (["--labels", "cloud", "--top", "0"], "--top: must be at least 1, got 0"),
        (["--labels", ","], "labels: at least one is needed"),
        (["--labels", "cloud,cloud"], "'cloud': there more than once"),
        (["--labels", "absent.txt"], r"absent.txt: no such file"),
        (["--labels", "archery"], "the word 'archery' in 'a archery' is not in the vocabulary of the miniature"),
        (["--labels", "cloud", "--run", "x", "--weights", "y"], "a run has weights of its own"),
        (["--labels", "cloud", "--run", ""], "--run: the path is empty"),
        (["--labels", "cloud", "--weights", ""], "--weights: the path is empty"),
        (
            ["--labels", "cloud", "--run", "x", "--model.name", "ViT-B-32"],
            "--run x and --model.name ViT-B-32: a run has",
        ),
        (["--labels", "cloud", "--model.pretrained", "openai"], "--model.pretrained openai: the miniature has weights"),
        (["--labels", "absent.csv"], "absent.csv: no such file"),
        (["--labels", "cloud", "--anchor-weight", "0.5"], "there are no fine-tuned weights, so it is 1, got 0.5"),
        (["--labels", "cloud", "--multi-label"], "several: at anchor weight 1 there is no calibration of this model"),
        (["--labels", "cloud", "--multi-label", "--window", "2s"], "along its time a video shows one label at a time"),
        (["--labels", "cloud", "--window", "two"], "--window: a positive number of seconds is expected, such as 2s"),
        (["--labels", "cloud", "--window", "2s", "--step", "0"], "--step: a positive number of seconds is expected"),
    ],
)
def test_a_mistake_is_one_message(
    arguments: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture
) -> None:
    assert run(str(folder / "a.mp4"), *arguments) == 2
    assert message in capsys.readouterr().err


def test_time_is_of_one_video(folder: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(str(folder), "--labels", "cloud", "--window", "2s") == 2
    assert "--window: one video at a time, got 4" in capsys.readouterr().err


def test_a_folder_without_videos_is_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(str(tmp_path), "--labels", "cloud") == 2
    assert f"{tmp_path}: there is no video in this folder" in capsys.readouterr().err


def test_labels_are_a_text_or_a_file(tmp_path: Path) -> None:
    expected = {"archery": ["archery", "shooting arrows"], "juggling balls": ["juggling balls"]}
    assert read_labels("archery | shooting arrows, juggling balls,") == expected
    lines = tmp_path / "labels.txt"
    lines.write_text("archery|shooting arrows\n\njuggling balls\n")
    assert read_labels(str(lines)) == expected
    names = tmp_path / "labels.json"
    names.write_text(json.dumps(["archery", "a, b"]))
    assert read_labels(str(names)) == {"archery": ["archery"], "a, b": ["a, b"]}
    names.write_text(json.dumps({"sport": ["archery", "golf"], "rest": "sleeping"}))
    assert read_labels(str(names)) == {"sport": ["archery", "golf"], "rest": ["sleeping"]}
    for content in ('{"sport": 1}', "[1]", "3", "{"):
        names.write_text(content)
        with pytest.raises(ValueError, match=r"labels\.json: (no JSON|a list of names is expected)"):
            read_labels(str(names))


@pytest.fixture(scope="module")
def long(small_world: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """4 s of one thing, 4 s of another, and 4 s of the first again."""
    manifest = read_manifest(small_world["zs_object"])
    shown = [0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0]
    videos = [next(i for i, label in enumerate(manifest.labels) if label == k) + s % 4 for s, k in enumerate(shown)]
    frames = np.concatenate([Video(Path(manifest.location(i))).frames(range(16)) for i in videos])
    path = write_video(tmp_path_factory.mktemp("long") / "long.mp4", frames, rate=16)
    return path, list(manifest.classes)


def test_segments_say_what_is_shown_when(
    long: tuple[Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    video, classes = long
    picture = tmp_path / "picture.png"
    options = ["--labels", ",".join(classes[:2]), "--window", "1s", "--step", "0.5s", "--timeline", str(picture)]
    assert run(str(video), *options, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [segment["label"] for segment in found["segments"]] == [classes[0], classes[1], classes[0]]
    bounds = [(segment["start_s"], segment["end_s"]) for segment in found["segments"]]
    assert bounds[0][0] == 0
    assert bounds[-1][1] == 12
    assert [end for _, end in bounds[:-1]] == [start for start, _ in bounds[1:]]
    assert bounds[0][1] == pytest.approx(4, abs=0.5)
    assert bounds[1][1] == pytest.approx(8, abs=0.5)
    assert [(w["start_s"], w["end_s"]) for w in found["windows"]] == [(i / 2, i / 2 + 1) for i in range(23)]
    with Image.open(picture) as image:
        assert image.width > 1000


def test_a_video_that_cannot_be_read_along_its_time_is_exit_code_1(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert (
        run(str(folder / "text.mp4"), "--labels", "cloud", "--window", "1s", "--timeline", str(tmp_path / "t.png")) == 1
    )
    assert "not a readable video" in capsys.readouterr().err.replace("\n", " ")
    assert not (tmp_path / "t.png").exists()


def windows(window_s: float, step_s: float, frames: int) -> Windows:
    return Windows(window_s, step_s, frames=frames, size=96, cache=Cache())


@pytest.mark.parametrize("length", [0.1, 1.0, 2.0, 2.5, 3.0, 7.3, 60.0])
@pytest.mark.parametrize("step", [0.3, 1.0, 2.0])
def test_windows_cover_a_video_from_its_first_to_its_last_moment(length: float, step: float) -> None:
    starts = windows(2.0, step, 4).starts(length)
    assert starts[0] == 0
    assert starts[-1] == pytest.approx(max(0, length - 2))
    assert (np.diff(starts) <= step + 1e-9).all()
    assert (np.diff(starts) > 0).all()


def test_windows_go_by_time_stamps_and_not_by_counting(tmp_path: Path) -> None:
    """Of a recording whose frame rate changes: 20 frames in the first second, 5 in each later one."""
    path = tmp_path / "variable.mp4"
    times = [i / 20 for i in range(20)] + [1 + i / 5 for i in range(20)]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=20, options={"qscale": "2"})
        stream.height, stream.width, stream.pix_fmt = 96, 128, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for frame, time in zip(numbered(40), times, strict=True):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture.pts, picture.time_base = round(1000 * time), Fraction(1, 1000)
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    np.testing.assert_allclose(Video(path).times_s, times, atol=0.002)
    reading = windows(1.0, 1.0, 5)
    clips, length, shortfall = reading(Place(str(path), 0))
    assert shortfall == ""
    assert length == pytest.approx(5, abs=0.2)
    frames = [int(np.searchsorted(times, t + 0.5 / 5 + j / 5 + 1e-6)) - 1 for t in range(5) for j in range(5)]
    left = Video(path, 96).frames(frames)
    assert numbers(left) == frames
    expected = left.reshape(5, 5, *left.shape[1:])[:5]
    got = clips.transpose(0, 2, 3, 4, 1)[:5]
    assert np.array_equal(got[:5], expected[:, :, :, 16:112])


@pytest.mark.parametrize(("text", "expected"), [("2s", 2), ("0.5 s", 0.5), (".25", 0.25), ("3", 3)])
def test_durations_are_seconds(text: str, expected: float) -> None:
    assert seconds(text, "--window") == expected


def test_an_answer_of_the_miniature_waits_for_no_library_that_it_can_do_without(folder: Path) -> None:
    """A time would depend on the machine; what is loaded does not."""
    heavy = {"open_clip", "torchvision", "timm", "transformers", "sympy", "torch._dynamo", "torch.distributed.tensor"}
    script = f"""
import sys
from applications.openvclip.__main__ import main

if __name__ == "__main__":
    main(["predict", {str(folder / "a.mp4")!r}, "--labels", "cloud,square", "--workers", "1", "--csv"])
    print("loaded:", *({heavy} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "cloud" in done.stdout
    assert done.stdout.splitlines()[-1] == "loaded:"


def test_processes_that_read_videos_for_it_do_without_torch() -> None:
    modules = "applications.openvclip.data.views, applications.openvclip.data.workers"
    script = f"import sys, {modules}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_a_server_that_cannot_be_reached_costs_the_other_videos_nothing(
    folder: Path, capsys: pytest.CaptureFixture
) -> None:
    pytest.importorskip("aiohttp")
    nowhere = "http://127.0.0.1:9/clip.mp4"  # the port is for discarding, and nobody listens there
    assert run(nowhere, str(folder / "a.mp4"), "--labels", "cloud,square", "--csv") == 1
    lost, *seen = csv.DictReader(io.StringIO(capsys.readouterr().out))
    assert lost["video"] == nowhere
    assert "Cannot connect to host 127.0.0.1:9" in lost["fault"]
    assert [row["video"] for row in seen] == 2 * [str(folder / "a.mp4")]
