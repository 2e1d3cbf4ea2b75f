"""What is scored: CLIP* frame by frame, and the sum over the views of a video."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import multilabel_average_precision

from applications.openvclip.data.manifest import Manifest
from applications.openvclip.data.sampling import Sampling
from applications.openvclip.model.video_encoder import VideoEncoder
from applications.openvclip.zeroshot.evaluation import scorers_of
from applications.openvclip.zeroshot.logits import LogitFiles
from applications.openvclip.zeroshot.passes import Pass
from applications.openvclip.zeroshot.protocols import Protocol
from applications.openvclip.zeroshot.scores import results_of, top_k_correct
from interpolate.weights import trainable_weights


def test_the_baseline_is_the_image_model_on_every_frame(source) -> None:
    anchor = trainable_weights(VideoEncoder(source.clip))
    scorer = scorers_of(source.clip, "mask", anchor, None, [])["CLIP*"]
    generator = torch.Generator().manual_seed(0)
    video = torch.randn(2, 3, 4, 32, 32, generator=generator)
    classes = torch.nn.functional.normalize(torch.randn(5, 128, generator=generator), dim=-1)
    with torch.no_grad():
        frames = torch.stack([source.clip.encode_image(video[:, :, t], normalize=True) for t in range(4)], dim=1)
        expected = source.clip.logit_scale.exp() * frames.mean(dim=1) @ classes.T
        torch.testing.assert_close(scorer(video, classes), expected, rtol=1e-4, atol=1e-4)


def test_the_views_of_a_video_are_added(tmp_path: Path) -> None:
    content = {"videos": ["/v.mp4"], "scorers": ["CLIP*"], "views": 2, "classes": ["a", "b"]}
    files = LogitFiles(tmp_path, content)
    files.prepare()
    files.append(0, [0], np.array([[[[1.0, 0.0], [0.0, 3.0]]]], np.float32))  # the second view is surer than the first
    part = Manifest("m", "/", ("v.mp4",), (1,), ("a", "b"))
    protocol = Protocol("p", (part,), sampling=Sampling(views=2))
    one = Pass(("/v.mp4",), ("a", "b"), protocol.templates, protocol.sampling)
    assert results_of([protocol], one, files)[0].accuracy == {"CLIP*": {"top-1": [1.0]}}


def test_accuracy_counts_labels_among_the_highest_logits() -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0], [1.0, 3.0, 2.0], [2.0, 1.0, 3.0]])
    labels = torch.tensor([0, 2, 1])
    assert top_k_correct(logits, labels).tolist() == [True, False, False]
    assert top_k_correct(logits, labels, k=2).tolist() == [True, True, False]
    assert top_k_correct(logits, labels, k=3).all()


@pytest.mark.parametrize("unreadable", ["wrong", "left-out"])
def test_figures_read_in_parts_are_those_of_the_whole(tmp_path: Path, monkeypatch, unreadable) -> None:
    generator = np.random.default_rng(0)
    videos, classes, scorers = [f"/v{i}.mp4" for i in range(60)], [f"c{i}" for i in range(7)], ["CLIP*", "0.5"]
    logits = generator.normal(size=(60, 2, 3, 7)).astype(np.float32)
    content = {"videos": videos, "scorers": scorers, "views": 3, "classes": classes}
    files = LogitFiles(tmp_path, content)
    monkeypatch.setattr("applications.openvclip.zeroshot.logits._CHUNK_BYTES", 7 * files.record.itemsize)
    files.prepare()
    bad = {3, 40}
    order = [i for i in generator.permutation(60) if i not in bad]
    for process, share in enumerate((order[:17], order[17:18], order[18:])):
        files.append(process, share, logits[share])
    for i in bad:
        files.append_fault(1, "unreadable", i, "torn")
    parts = []
    for name, n_classes in (("few", 4), ("all", 7)):
        rows = sorted(generator.choice(60, size=40, replace=False).tolist())
        paths = tuple(videos[i][1:] for i in rows)
        labels = tuple(int(x) for x in generator.integers(0, n_classes, 40))
        parts.append(Manifest(name, "/", paths, labels, tuple(reversed(classes[:n_classes]))))
    cut = videos.index(f"/{parts[0].paths[0]}")
    files.append_fault(1, "cut-off", cut, "half of it")
    protocol = Protocol("p", tuple(parts), sampling=Sampling(views=3), top_k=(1, 3), unreadable=unreadable)
    one = Pass(tuple(videos), tuple(classes), protocol.templates, protocol.sampling)
    (result,) = results_of([protocol], one, files)

    summed = logits.sum(axis=2)
    for part, manifest in enumerate(parts):
        rows = [videos.index(f"/{path}") for path in manifest.paths]
        kept = [i for i, row in enumerate(rows) if unreadable == "wrong" or row not in bad]
        for s, scorer in enumerate(scorers):
            for k in (1, 3):
                right = 0
                for i in kept:
                    scores = {name: summed[rows[i], s, classes.index(name)] for name in manifest.classes}
                    best = sorted(scores, key=lambda name: -scores[name])[:k]
                    right += rows[i] not in bad and manifest.classes[manifest.labels[i]] in best
                assert result.accuracy[scorer][f"top-{k}"][part] == pytest.approx(right / len(kept))
    assert set(result.unreadable) <= {"/v3.mp4", "/v40.mp4"}
    assert result.cut_off == {videos[cut]: "half of it"}


@pytest.mark.parametrize("unreadable", ["wrong", "left-out"])
def test_videos_of_several_labels_are_measured_by_the_mean_average_precision_of_torchmetrics(
    tmp_path: Path, unreadable
) -> None:
    generator = np.random.default_rng(0)
    videos, classes = [f"/v{i}.mp4" for i in range(50)], [f"c{i}" for i in range(6)]
    logits = generator.integers(0, 8, size=(50, 1, 2, 6)).astype(np.float32)  # many are equal
    shown = generator.random((50, 6)) < 0.3
    shown[:, 5] = False  # a class that no video shows competes, and has no average precision
    shown[~shown.any(axis=1), 0] = True
    files = LogitFiles(tmp_path, {"videos": videos, "scorers": ["0.5"], "views": 2, "classes": classes})
    files.prepare()
    bad = [4, 30]
    order = [i for i in generator.permutation(50).tolist() if i not in bad]
    files.append(0, order[:20], logits[order[:20]])
    files.append(1, order[20:], logits[order[20:]])
    for i in bad:
        files.append_fault(0, "unreadable", i, "torn")
    pairs = generator.permutation(np.argwhere(shown)).tolist()  # a video's rows lie apart
    manifest = Manifest(
        "m", "/", tuple(videos[i][1:] for i, _ in pairs), tuple(5 - c for _, c in pairs), tuple(reversed(classes))
    )
    protocol = Protocol("p", (manifest,), sampling=Sampling(views=2), unreadable=unreadable, multi_label=True)
    one = Pass(tuple(videos), tuple(classes), protocol.templates, protocol.sampling)
    (result,) = results_of([protocol], one, files)

    scores = logits.sum(axis=2)[:, 0]
    scores[bad] = scores.min() - 1  # behind all others
    kept = [i for i in range(50) if unreadable == "wrong" or i not in bad]
    scores = (scores - scores.min()) / np.ptp(scores)  # what is outside of [0, 1] they put in by a sigmoid
    expected = multilabel_average_precision(
        torch.tensor(scores[kept, :5]), torch.tensor(shown[kept, :5]).long(), num_labels=5, average=None
    )
    assert result.per_class["0.5"] == pytest.approx({f"c{i}": expected[i].item() for i in range(5)}, abs=1e-6)
    assert result.accuracy == {"0.5": {"mAP": [pytest.approx(expected.mean().item(), abs=1e-6)]}}
    assert (result.videos, result.classes, result.metrics, result.confidence) == (50, 6, ["mAP"], {"0.5": {}})


def test_memory_does_not_grow_with_the_logits(tmp_path: Path) -> None:
    videos, classes = [f"/v{i}" for i in range(4000)], [f"c{i}" for i in range(600)]
    content = {"videos": videos, "scorers": [str(i) for i in range(20)], "views": 1, "classes": classes}
    files = LogitFiles(tmp_path, content)  # 192 MB
    files.prepare()
    for first in range(0, 4000, 500):
        files.append(0, range(first, first + 500), np.zeros((500, 20, 1, 600), np.float32))
    part = Manifest("m", "/", tuple(v[1:] for v in videos), (0,) * 4000, tuple(classes))
    protocol = Protocol("p", (part,))
    one = Pass(tuple(videos), tuple(classes), protocol.templates, protocol.sampling)
    tracemalloc.start()
    results_of([protocol], one, files)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100e6, "numpy's arrays are traced: two parts of 32 MiB, one going as the next comes"


def test_what_could_not_be_read_is_tried_again_and_a_crash_between_leaves_nothing_out(tmp_path: Path) -> None:
    content = {"videos": ["/a", "/b", "/c"], "scorers": ["CLIP*"], "views": 1, "classes": ["x", "y"]}
    files = LogitFiles(tmp_path, content)
    files.prepare()
    files.append(0, [0], np.ones((1, 1, 1, 2), np.float32))
    files.append_fault(0, "unreadable", 1, "no route to the store")
    files.append_fault(0, "cut-off", 0, "half of it")
    for fault in ("unreadable", "cut-off"):
        with (files.path / f"0001.{fault}.jsonl").open("a") as torn:
            torn.write('{"video": 2, "rea')
    again = LogitFiles(tmp_path, content)
    again.prepare()
    assert again.done() == {0}
    again.append(0, [1, 2], np.ones((2, 1, 1, 2), np.float32))
    assert again.faults("unreadable") == {}
    assert again.faults("cut-off") == {0: "half of it"}
    assert sorted(int(i) for videos, _ in again.chunks() for i in videos) == [0, 1, 2]


def test_a_pass_in_which_a_video_is_missing_or_twice_gives_no_figures(tmp_path: Path) -> None:
    content = {"videos": ["/a", "/b"], "scorers": ["CLIP*"], "views": 1, "classes": ["x", "y"]}
    files = LogitFiles(tmp_path, content)
    files.prepare()
    files.append(0, [0], np.ones((1, 1, 1, 2), np.float32))
    with pytest.raises(RuntimeError, match="1 of 2 videos are missing, 0 are there more than once"):
        next(files.chunks())
    files.append(1, [0, 1], np.ones((2, 1, 1, 2), np.float32))
    with pytest.raises(RuntimeError, match="0 of 2 videos are missing, 1 are there more than once"):
        next(files.chunks())
