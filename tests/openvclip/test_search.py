"""Features of many videos in a file, and finding videos in it by words and by videos."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from applications.openvclip import Classifier
from applications.openvclip.__main__ import main
from applications.openvclip.data.decode import Video
from applications.openvclip.data.manifest import read_manifest
from applications.openvclip.inference import features as files
from applications.openvclip.inference.features import Features, read_features, write_features
from applications.openvclip.inference.search import read_captions, recall, videos_of
from applications.openvclip.miniature import tiny_clip


@pytest.fixture(scope="module")
def folder(small_world: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six videos, one of them with a name for browsers to stumble over, and a file that is none."""
    root = tmp_path_factory.mktemp("videos")
    manifest = read_manifest(small_world["zs_object"])
    for i in range(0, 24, 4):
        shutil.copy(manifest.location(i), root / f"{manifest.classes[manifest.labels[i]]}.mp4")
    (root / f"{manifest.classes[0]}.mp4").rename(root / "<b>&'.mp4")
    (root / "text.mp4").write_text("no video")
    return root


@pytest.fixture(scope="module")
def extracted(folder: Path) -> Path:
    output = folder.parent / "features.safetensors"
    assert run("features", str(folder), "-o", str(output), "--workers", "1") == 1
    return output


def run(*arguments: str) -> int:
    try:
        main(arguments)
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def test_features_are_those_of_the_classifier_and_unreadable_videos_are_named(extracted: Path, folder: Path) -> None:
    found = read_features(extracted)
    assert set(found.videos) == {str(path) for path in folder.iterdir() if path.name != "text.mp4"}
    assert found.made["unreadable"].keys() == {str(folder / "text.mp4")}
    classifier = Classifier.load(model="miniature")
    expected = torch.stack([classifier.features(video) for video in found.videos])
    torch.testing.assert_close(found.embeddings, expected, atol=1e-5, rtol=1e-5)  # batches of another size
    assert not files.parts_of(extracted).exists()


def test_an_interrupted_extraction_goes_on_and_looks_at_no_video_twice(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "f.safetensors"
    (folder / "text.mp4").rename(tmp_path / "aside")
    try:
        with monkeypatch.context() as patched:
            patched.setattr(files, "write_features", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(SystemExit, match="130"):
                main(["features", str(folder), "-o", str(output), "--workers", "1"])
        assert not output.exists()
        monkeypatch.setattr(Video, "__init__", lambda *_: pytest.fail("a video was opened"))
        monkeypatch.setattr("applications.openvclip.data.workers.Workers.ask", lambda *_: pytest.fail("it was read"))
        assert run("features", str(folder), "-o", str(output)) == 0
    finally:
        (tmp_path / "aside").rename(folder / "text.mp4")
    assert len(read_features(output).videos) == 6


@pytest.mark.slow
def test_processes_of_torchrun_share_the_videos(extracted: Path, folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "f.safetensors"
    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "applications.openvclip"]
    command = [
        sys.executable,
        *ranks,
        "features",
        str(folder),
        "-o",
        str(output),
        "--workers",
        "1",
        "--batch-size",
        "1",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert output.exists(), done.stderr[-3000:]
    one, two = read_features(extracted), read_features(output)
    assert one.videos == two.videos
    torch.testing.assert_close(one.embeddings, two.embeddings, atol=1e-5, rtol=1e-5)


def test_parquet_holds_the_same(extracted: Path, tmp_path: Path) -> None:
    found = read_features(extracted)
    write_features(tmp_path / "f.parquet", found)
    again = read_features(tmp_path / "f.parquet")
    assert (again.videos, again.made) == (found.videos, found.made)
    assert torch.equal(again.embeddings, found.embeddings)


def test_what_holds_no_features_is_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    save_file({"w": torch.ones(1)}, tmp_path / "w.safetensors")
    assert run("search", "cloud", "--in", str(tmp_path / "w.safetensors")) == 2
    assert "holds no features" in capsys.readouterr().err
    assert run("search", "cloud", "--in", str(tmp_path / "absent.safetensors")) == 2
    assert "`openvclip features FOLDER -o" in capsys.readouterr().err
    assert run("features", "x.mp4", "-o", "features.csv") == 2
    assert "a .safetensors or .parquet file is expected, got features.csv" in capsys.readouterr().err
    assert run("search", "--in", str(tmp_path / "w.safetensors")) == 2
    assert "words or a video to look for, or --captions" in capsys.readouterr().err


def test_words_and_videos_find_videos_and_a_page_shows_them(
    extracted: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    classifier = Classifier.load(model="miniature", templates=["{}"])
    (text,) = classifier.embeddings_of(["cloud"])
    page = tmp_path / "found.html"
    assert run("search", "cloud", "--in", str(extracted), "--json", "--html", str(page)) == 0
    found = json.loads(capsys.readouterr().out)["found"]
    expected = {str(path): float(classifier.features(path) @ text) for path in folder.iterdir() if path.stem != "text"}
    assert [row["video"] for row in found] == sorted(expected, key=lambda video: -expected[video])
    assert {row["video"]: row["cosine"] for row in found} == pytest.approx(expected, abs=1e-5)
    content = page.read_text()
    assert content.count("data:image/jpeg;base64,") == 6
    assert "&lt;b&gt;&amp;&#x27;.mp4" in content
    assert "<b>&" not in content
    assert run("search", str(folder / "<b>&'.mp4"), "--in", str(extracted), "--top", "1", "--json") == 0
    (itself,) = json.loads(capsys.readouterr().out)["found"]
    assert (itself["video"], itself["cosine"]) == (str(folder / "<b>&'.mp4"), pytest.approx(1, abs=1e-5))


def test_features_of_other_weights_are_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = tiny_clip.load().state_dict()
    save_file(weights, tmp_path / "theta.safetensors")
    videos, output = (
        str(next(path for path in folder.iterdir() if path.stem != "text")),
        str(tmp_path / "f.safetensors"),
    )
    options = ["--weights", os.path.relpath(tmp_path / "theta.safetensors"), "--anchor-weight", "0", "--workers", "1"]
    assert run("features", videos, "-o", output, *options) == 0
    monkeypatch.chdir(tmp_path)  # what was given by relative paths is found from anywhere
    assert run("search", "cloud", "--in", output) == 0
    save_file(weights | {"visual.proj": weights["visual.proj"] + 1}, tmp_path / "theta.safetensors")
    assert run("search", "cloud", "--in", output) == 2
    assert "made with other weights than" in capsys.readouterr().err


def drawn(n: int, of: list[int]) -> tuple[torch.Tensor, Features]:
    generator = torch.Generator().manual_seed(0)
    videos = F.normalize(torch.randn(n, 8, generator=generator), dim=1)
    texts = F.normalize(videos[of] + 0.7 * torch.randn(len(of), 8, generator=generator), dim=1)
    return texts, Features(tuple(f"/v/{i}.mp4" for i in range(n)), videos, {})


def test_recall_is_that_of_counting_one_by_one() -> None:
    """With several captions of a video, and videos without any, which are no candidates."""
    of = [0, 0, 1, 2, 3, 3, 3, 5, 8, 9, 11, 12, 13, 14, 15, 16]
    texts, features = drawn(20, of)
    found = recall(texts, of, features)
    candidates = sorted(set(of))
    cosines = texts @ features.embeddings.T
    to_video = [sorted(candidates, key=lambda v: -cosines[c, v]).index(video) + 1 for c, video in enumerate(of)]
    to_text = []
    for video in candidates:
        order = sorted(range(len(of)), key=lambda c: -cosines[c, video])
        best_own = next(i for i, c in enumerate(order) if of[c] == video)
        to_text.append(best_own + 1)
    for direction, ranks in (("text → video", to_video), ("video → text", to_text)):
        for k in (1, 5, 10):
            assert found[direction][f"recall@{k}"] == pytest.approx(sum(r <= k for r in ranks) / len(ranks))
        assert found[direction]["median rank"] == torch.tensor(ranks).double().quantile(0.5)
    assert 0 < found["text → video"]["recall@1"] < 1


def test_embeddings_that_are_the_same_for_all_find_nothing() -> None:
    same = F.normalize(torch.ones(20, 8), dim=1)
    found = recall(same, list(range(20)), Features(tuple(map(str, range(20))), same, {}))
    assert [found[d]["recall@10"] for d in found] == [0, 0]


def test_captions_belong_to_videos_by_their_names(tmp_path: Path) -> None:
    table = tmp_path / "msrvtt.csv"
    table.write_text('key,vid_key,video_id,sentence\nret0,msr1,1,a person\nret1,msr1,2.mp4,"a cat, asleep"\n')
    captions = read_captions(str(table))
    _, features = drawn(3, [0])
    assert [caption.text for caption in captions] == ["a person", "a cat, asleep"]
    assert videos_of(captions, features) == [1, 2]
    table.write_text("video_id,sentence\n7,a person\n")
    with pytest.raises(ValueError, match="1 of 1 captions are of videos without features, 7 the first"):
        videos_of(read_captions(str(table)), features)
    twice = Features(("/a/1.mp4", "/b/1.mp4"), features.embeddings[:2], {})
    table.write_text("video_id,sentence\n1,a person\n")
    with pytest.raises(ValueError, match="1: several videos have this name"):
        videos_of(read_captions(str(table)), twice)
    for content, message in (
        ("a,b\n1,2\n", "columns video_id and sentence are expected, got a, b"),
        ("video_id,sentence\n1,\n", "line 2: a video and a caption are expected"),
        ("video_id,sentence\n1,a, b\n", "line 2: a video and a caption are expected"),
        ("video_id,sentence\n", "there is no caption"),
    ):
        table.write_text(content)
        with pytest.raises(ValueError, match=message):
            read_captions(str(table))


def test_recall_of_known_captions_is_printed(extracted: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    names = [Path(video).stem for video in read_features(extracted).videos if "<" not in video]
    table = tmp_path / "captions.csv"
    table.write_text("video,caption\n" + "".join(f"{name},{name}\n" for name in names))
    assert run("search", "--captions", str(table), "--in", str(extracted), "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["captions"], found["videos"]) == (5, 5)
    assert found["text → video"]["recall@5"] == 1
