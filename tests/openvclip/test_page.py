"""The page: what it takes and refuses, what it tells, and that it goes on after every bad upload."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest

pytest.importorskip("gradio")

from applications.openvclip.data.decode import VideoReadError
from applications.openvclip.data.manifest import read_manifest
from applications.openvclip.data.sampling import Sampling
from applications.openvclip.data.storage import Cache
from applications.openvclip.data.views import EvaluationViews
from applications.openvclip.inference.classifier import Classifier
from applications.openvclip.page import drawing
from applications.openvclip.page.app import Page
from applications.openvclip.page.confusions import worst_confusions
from applications.openvclip.page.content import Content
from applications.openvclip.page.server import _names_url
from applications.openvclip.page.uploads import Looks, UploadReader
from applications.openvclip.zeroshot.logits import LogitFiles
from applications.openvclip.zeroshot.protocols import Protocol
from tests.openvclip.bad_uploads import BAD, write_bad, write_clip

READER = UploadReader(
    EvaluationViews(Sampling(frames=4, stride=4, target_fps=None, sampler="dense", views=1), 32, Cache())
)


@pytest.mark.parametrize("name", BAD)
def test_a_bad_upload_is_refused_with_its_reason(name: str, tmp_path: Path) -> None:
    with pytest.raises(VideoReadError, match=BAD[name]) as raised:
        READER(str(write_bad(name, tmp_path)))
    assert str(tmp_path) not in str(raised.value)  # whoever sent it need not know where it lies here


def test_a_playlist_does_not_open_what_it_names(tmp_path: Path) -> None:
    """FFmpeg's playlists and lists of files name other files, which would be read with the rights of the server."""
    private = write_clip(tmp_path / "private.ts", seconds=1)
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{private}\n#EXT-X-ENDLIST\n"
    joined = f"ffconcat version 1.0\nfile {private.name}\n"
    for name, text in (("a.m3u8", playlist), ("b.mp4", joined)):
        (tmp_path / name).write_text(text)
        with av.open(str(tmp_path / name), options={"allowed_extensions": "ALL", "safe": "0"}) as container:
            assert container.streams.video  # FFmpeg itself opens it
        with pytest.raises(VideoReadError, match="no video that can be read here"):
            READER(str(tmp_path / name))


def test_a_long_video_is_looked_at_along_its_time(tmp_path: Path) -> None:
    short = READER(str(write_clip(tmp_path / "short.mp4", seconds=1.5)))
    assert short.windows.shape == (0, 3, 4, 32, 32)
    long = READER(str(write_clip(tmp_path / "long.mp4", seconds=40)))
    assert long.views.shape == (1, 3, 4, 32, 32)
    assert long.length_s == pytest.approx(40)
    assert len(long.windows) == len(long.starts) == 15
    assert long.starts[-1] + long.window_s == pytest.approx(40)


def test_a_file_that_is_a_url_is_found_wherever_it_stands_in_a_request() -> None:
    inside = {"data": [None, {"path": "http://192.0.2.1/a.mp4", "meta": {"_type": "gradio.FileData"}}]}
    assert _names_url(json.dumps(inside).encode())
    assert _names_url(json.dumps([{"video": {"path": "HTTPS:x"}}]).encode())
    own = {"path": "/tmp/x/a.mp4", "url": "http://127.0.0.1:7860/gradio_api/file=/tmp/x/a.mp4"}  # noqa: S108 a text
    assert not _names_url(json.dumps({"data": [own, "see http://example.org, 0.5"]}).encode())
    assert not _names_url(b"no JSON")


@pytest.fixture
def page(small_world: dict[str, Path]) -> Page:
    pool = SimpleNamespace(ask=lambda path: _tried(path))
    classifier = Classifier.load(model="miniature")
    return Page(classifier, pool, Content("toy", "square", {}, None, ""))  # pyright: ignore[reportArgumentType]


def _tried(path: str) -> Looks | VideoReadError:
    try:
        return READER(path)
    except VideoReadError as error:
        return error


def test_bars_are_the_answers_of_the_classifier_and_labels_are_escaped(
    page: Page, small_world: dict[str, Path]
) -> None:
    manifest = read_manifest(small_world["zs_object"])
    looks, bars, timeline = page.look(manifest.location(0), ", ".join(manifest.classes), 1.0)
    assert looks is not None
    assert timeline == ""
    expected = page.classifier.classify(manifest.location(0), manifest.classes)
    shown = re.findall(r'class="figure">([\d.]+)%', bars)
    assert [float(p) for p in shown] == [round(100 * expected[name], 1) for name in manifest.classes]
    hostile = page.bars(looks, "<script>alert(1)</script>", 1.0)
    assert "<script>" not in hostile
    assert "&lt;script&gt;" in hostile
    assert "label" in page.bars(looks, " , ", 1.0)
    assert "not in the vocabulary" in page.bars(looks, "zebra", 1.0)


def test_labels_that_look_like_a_file_are_not_read(page: Page, small_world: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("subset of\nhollow flag\n")
    looks = _tried(read_manifest(small_world["zs_object"]).location(0))
    assert isinstance(looks, tuple)
    assert "not in the vocabulary" in page.bars(looks, str(tmp_path / "labels.txt"), 1.0)


def test_worst_confusions_are_those_of_the_logits(small_world: dict[str, Path], tmp_path: Path) -> None:
    manifest = read_manifest(small_world["closed"])
    videos = [manifest.location(i) for i in range(len(manifest))]
    content = {"videos": videos, "scorers": ["0", "0.5"], "views": 2, "classes": list(manifest.classes), "weights": ""}
    files = LogitFiles(tmp_path, content)
    files.prepare()
    right = np.eye(len(manifest.classes))[list(manifest.labels)]
    logits = np.stack([right, right], axis=1)[:, :, None].repeat(2, axis=2)
    second = [i for i, label in enumerate(manifest.labels) if label == 1]
    logits[second[:2], 1] = np.eye(len(manifest.classes))[3]  # two of the second class are taken for the fourth
    files.append(0, range(len(videos)), logits)
    (found,) = worst_confusions(tmp_path, [Protocol("closed", (manifest,), ("a {}",), Sampling())], "0.5", 5)
    assert (found.shown, found.taken_for) == (manifest.classes[1], manifest.classes[3])
    assert found.videos == tuple(videos[i] for i in second[:2])
    assert found.of == len(second)
    assert worst_confusions(tmp_path, [Protocol("closed", (manifest,), ("a {}",), Sampling())], "0", 5) == []


def test_the_present_point_lies_between_the_measured_ones() -> None:
    tradeoff = drawing.Tradeoff.__new__(drawing.Tradeoff)
    tradeoff.weights, tradeoff.places = ["0", "0.5", "1"], np.array([[80.0, 40.0], [70.0, 60.0], [50.0, 62.0]])
    assert tradeoff.at(0.25) == (75, 50)
    assert tradeoff.at(1) == (50, 62)
