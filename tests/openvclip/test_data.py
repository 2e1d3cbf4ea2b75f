"""From a manifest to batches: rows, transforms, order, and what takes the place of unreadable videos."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from applications.openvclip.data import reader, transforms
from applications.openvclip.data.augmentation import Augmentation
from applications.openvclip.data.decode import Video, VideoReadError
from applications.openvclip.data.index import Index
from applications.openvclip.data.inspection import inspect
from applications.openvclip.data.loader import MicroBatch, TrainingOrder, micro_batches
from applications.openvclip.data.manifest import Manifest, read_manifest
from applications.openvclip.data.sampling import Sampling
from applications.openvclip.data.storage import Cache
from applications.openvclip.data.training_clips import TrainingClips, training_clip
from applications.openvclip.data.transforms import Normalisation
from applications.openvclip.data.views import EvaluationViews, evaluation_crops
from applications.openvclip.model.video_encoder import VideoEncoder
from tests.openvclip.files import cut_off, ramp, write_manifest, write_video

SAMPLING = Sampling(frames=4, stride=4, target_fps=None, sampler="dense", views=1)


# manifest


def test_labels_are_indices_of_the_sorted_classes(tmp_path: Path) -> None:
    manifest = read_manifest(write_manifest(tmp_path / "ucf" / "m.csv", [("a.mp4", "surfing"), ("b/c.mp4", "archery")]))
    assert manifest.name == "ucf"
    assert manifest.classes == ("archery", "surfing")
    assert manifest.labels == (1, 0)
    assert manifest.location(1) == str(tmp_path / "ucf" / "b" / "c.mp4")


def test_a_misspelt_label_is_named_with_its_video_and_the_nearest_class(tmp_path: Path) -> None:
    path = write_manifest(tmp_path / "m.csv", [("a.mp4", "archery"), ("b.mp4", "archrey")])
    with pytest.raises(ValueError, match=r"b\.mp4: 'archrey' is not one of the 2 classes\. Did you mean 'archery'\?"):
        read_manifest(path, classes=["archery", "surfing"])


def test_a_manifest_without_columns_or_rows_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text("video,class\na.mp4,archery\n")
    with pytest.raises(ValueError, match=r"m\.csv, line 1: 'video,class' is not understood.*columns path and label"):
        read_manifest(tmp_path / "m.csv")
    with pytest.raises(ValueError, match="no video in it"):
        read_manifest(write_manifest(tmp_path / "m.csv", []))
    with pytest.raises(FileNotFoundError, match=r"absent\.csv"):
        read_manifest(tmp_path / "absent.csv")


# transforms


@given(
    height=st.integers(20, 60), width=st.integers(20, 60), size=st.sampled_from([8, 17, 20]), seed=st.integers(0, 999)
)
def test_all_frames_of_a_clip_are_augmented_alike(height: int, width: int, size: int, seed: int) -> None:
    frame = np.random.default_rng(seed).integers(0, 256, (1, height, width, 3), dtype=np.uint8)
    augmentation = Augmentation(max_short_side=1.3, horizontal_flip=True, colour_jitter=0.4)
    rng = np.random.default_rng(seed)
    assert size <= augmentation.short_side(size, rng) <= 1.3 * size + 0.5
    clip = training_clip(frame.repeat(3, axis=0), size=size, augmentation=augmentation, rng=rng)
    assert clip.shape == (3, 3, size, size)
    assert clip.dtype == torch.uint8
    assert torch.equal(clip[:, 0], clip[:, 1])
    assert torch.equal(clip[:, 0], clip[:, 2])


def test_half_of_the_clips_are_mirrored() -> None:
    frames = np.arange(8, dtype=np.uint8).reshape(1, 1, 8, 1).repeat(8, axis=1).repeat(3, axis=3)
    mirrored = 0
    for seed in range(100):
        clip = training_clip(
            frames,
            size=8,
            augmentation=Augmentation(horizontal_flip=True),
            rng=np.random.default_rng(seed),
        )
        mirrored += bool(clip[0, 0, 0, 0] > clip[0, 0, 0, -1])
    assert 30 < mirrored < 70


def test_pixels_have_the_mean_and_deviation_that_the_model_expects() -> None:
    clip = torch.full((5, 3, 2, 4, 4), 255, dtype=torch.uint8)
    pixels = transforms.normalised(clip, Normalisation((0.5, 0.0, 0.0), (0.25, 1.0, 2.0)))
    assert pixels.shape == clip.shape
    torch.testing.assert_close(pixels[4, :, 0, 0, 0], torch.tensor([2.0, 1.0, 0.5]))


def test_three_crops_are_the_ends_and_the_middle_of_the_longer_side() -> None:
    columns = np.broadcast_to(np.arange(13, dtype=np.uint8)[:, None], (2, 8, 13, 3)).copy()
    crops = evaluation_crops(columns, size=8, crops=3)
    assert crops.shape == (3, 3, 2, 8, 8)
    assert crops[:, 0, 0, 0, 0].tolist() == [0, 3, 5]
    upright = evaluation_crops(columns.swapaxes(1, 2).copy(), size=8, crops=3)
    assert upright[:, 0, 0, 0, 0].tolist() == [0, 3, 5]
    np.testing.assert_array_equal(evaluation_crops(columns, size=8, crops=1)[0], crops[1])


# order


@given(
    samples=st.integers(1, 50),
    micro=st.integers(1, 10),
    per_step=st.integers(1, 6),
    world=st.integers(1, 6),
    epochs=st.integers(1, 3),
    seed=st.integers(0, 9),
    data=st.data(),
)
def test_processes_share_the_micro_batches_of_one_order_and_go_on_in_it(
    samples, micro, per_step, world, epochs, seed, data
) -> None:
    micro = min(micro, samples)
    per_step = min(per_step, samples // micro)
    world, batch_size = min(world, per_step), micro * per_step
    last = epochs * (samples // batch_size)
    whole = TrainingOrder(samples, batch_size, micro, seed, 0, last)
    batches = list(whole)
    assert len(batches) == last * per_step
    for epoch in range(epochs):
        of_epoch = [key for batch in batches for key in batch if key[0] == epoch]
        assert len(of_epoch) == len(set(of_epoch)) == whole.steps_per_epoch * batch_size
    first = data.draw(st.integers(0, last))
    for rank in range(world):
        order = TrainingOrder(samples, batch_size, micro, seed, first, last, rank, world)
        expected = [batches[step * per_step + m] for step in range(first, last) for m in range(rank, per_step, world)]
        assert list(order) == expected
        assert list(order.own) == list(range(rank, per_step, world))


def test_every_epoch_has_an_order_of_its_own() -> None:
    batches = list(TrainingOrder(20, 20, 20, seed=0, first_step=0, last_step=2))
    first, second = ([i for _, i in batch] for batch in batches)
    assert sorted(first) == sorted(second) == list(range(20))
    assert first != second != sorted(second)


def test_an_order_that_can_not_be_is_refused() -> None:
    with pytest.raises(ValueError, match=r"from 1 to the number of videos, 3, got 4"):
        TrainingOrder(3, 4, 4, 0, 0, 1)
    with pytest.raises(ValueError, match=r"micro_batch must divide the batch of 6 clips evenly, got 4"):
        TrainingOrder(10, 6, 4, 0, 0, 1)
    with pytest.raises(ValueError, match=r"3 processes for 2 micro-batches of 3 clips: some would have nothing to do"):
        TrainingOrder(10, 6, 3, 0, 0, 1, rank=0, world_size=3)


def training_clips(manifest: Manifest, size: int = 32) -> TrainingClips:
    return TrainingClips(manifest, SAMPLING, size, Augmentation(1.3, True, 0.4), seed=3, cache=Cache())


def batches(clips: TrainingClips, order: TrainingOrder, workers: int = 1, **more) -> list[MicroBatch]:
    return list(micro_batches(clips, order, workers=workers, time_limit_s=30, **more))


def test_batches_do_not_depend_on_the_number_of_workers(small_world: dict[str, Path]) -> None:
    manifest = read_manifest(small_world["train"])
    order = TrainingOrder(len(manifest), 5, 5, 3, 1, 5)
    alone, together = (batches(training_clips(manifest), order, workers) for workers in (1, 2))
    assert len(alone) == 4
    for (a, a_labels, videos), (b, b_labels, _) in zip(alone, together, strict=True):
        assert a.shape == (5, 3, 4, 32, 32)
        locations = [manifest.location(i) for i in range(len(manifest))]
        assert [manifest.labels[locations.index(video)] for video in videos] == a_labels.tolist()
        assert a.dtype == torch.uint8  # they are normalised where they are used
        assert torch.equal(a, b)
        assert torch.equal(a_labels, b_labels)


def test_an_unreadable_training_video_is_replaced_by_the_same_other_every_time(
    small_world: dict[str, Path], tmp_path: Path
) -> None:
    good = read_manifest(small_world["train"])
    (tmp_path / "broken.mp4").write_bytes(b"nothing")
    broken = str(tmp_path / "broken.mp4")
    manifest = replace(good, paths=(broken, *good.paths[1:]))
    order = TrainingOrder(len(manifest), 4, 2, 3, 0, len(manifest) // 4)
    told: list[tuple[str, str, str]] = []
    clips = training_clips(manifest)
    first, second = (batches(clips, order, on_fault=lambda *what: told.append(what)) for _ in range(2))
    for (a, a_labels, _), (b, b_labels, _) in zip(first, second, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a_labels, b_labels)
    assert [what[:2] for what in told] == [("unreadable", broken), ("unreadable", broken)]
    assert "broken.mp4: 7 bytes, not a readable video" in told[0][2]
    of_the_good = batches(training_clips(good), order)
    same = [torch.equal(a[i], b[i]) for (a, *_), (b, *_) in zip(first, of_the_good, strict=True) for i in range(2)]
    assert same.count(False) == 1  # nothing else has changed


def test_a_training_video_that_was_cut_off_is_used_and_told(tmp_path: Path) -> None:
    told: list[tuple[str, str, str]] = []
    manifest = Manifest("cut", "/", (str(cut_off(tmp_path / "a.avi")),), (0,), ("wave",))
    ((clips, *_),) = batches(
        training_clips(manifest), TrainingOrder(1, 1, 1, 3, 0, 1), on_fault=lambda *what: told.append(what)
    )
    assert clips.shape == (1, 3, 4, 32, 32)
    assert [what[:2] for what in told] == [("cut-off", manifest.location(0))]
    assert re.fullmatch(r"\d+ of the 60 frames that it announces are there", told[0][2])


def test_inspect_tells_which_videos_are_cut_off(tmp_path: Path) -> None:
    manifest = Manifest("cut", "/", (str(cut_off(tmp_path / "a.avi")),), (0,), ("wave",))
    found = inspect(manifest, workers=1, time_limit_s=60, cache=Cache())
    assert found.unreadable == {}
    lines = found.lines()
    assert "cut off, and used as far as they go: 1" in lines
    assert re.search(r"/a\.avi: \d+ of the 60 frames that it announces are there", "\n".join(lines))


def test_a_video_that_holds_less_than_its_packets_promise_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_video(tmp_path / "a.mp4", ramp(20))
    honest = reader.index_of

    def too_many(*what: Any) -> Index | None:
        index = honest(*what)
        return index and Index([*index.times, index.times[-1] + 512], index.keys)

    monkeypatch.setattr(reader, "index_of", too_many)
    video = Video(path)
    assert len(video) == 21
    assert video.chosen(lambda n, _: [0, n - 1]).shape[0] == 2
    assert len(video) == 20


def test_all_views_of_a_video_come_from_one_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "a.mp4", ramp(30, 48, 64))
    asked = []
    frames = Video.frames
    monkeypatch.setattr(Video, "frames", lambda video, indices: asked.append(indices) or frames(video, indices))
    views, _ = EvaluationViews(replace(SAMPLING, views=3, crops=3), 32, Cache())(str(path))
    assert views.shape == (9, 3, 4, 32, 32)
    assert len(asked) == 1
    assert len(asked[0]) == 12
    np.testing.assert_allclose(views[::3, 0, 0].mean(axis=(1, 2)), [8 * i for i in (0, 8, 17)], atol=3)


@pytest.mark.parametrize("name", ["mmaction_test.avi", "k400_arm_wrestling.mp4", "tc_av1_video.mkv"])
def test_a_real_clip_goes_through_dataset_and_encoder(real_videos: Path, source, name: str) -> None:
    views, _ = EvaluationViews(Sampling(frames=4), 32, Cache())(str(real_videos / name))
    assert views.shape == (3, 3, 4, 32, 32)
    normalisation = Normalisation(source.image_mean, source.image_std)
    with torch.no_grad():
        features = VideoEncoder(source.clip).encode(transforms.normalised(torch.from_numpy(views), normalisation))
    assert features.shape == (3, 4, 128)
    assert features.isfinite().all()
    assert not torch.equal(features[0], features[2])


# frames that are decoded once


def test_decoded_frames_are_those_of_the_video_and_outlive_it(tmp_path: Path) -> None:
    whole, cut = write_video(tmp_path / "whole.mp4", ramp(20)), cut_off(tmp_path / "cut.avi")
    kept = Cache(decoded=tmp_path / "decoded")
    for path in (whole, cut):
        views = [EvaluationViews(SAMPLING, 16, cache)(str(path)) for cache in (Cache(), kept, kept)]
        assert all(np.array_equal(views[0][0], found) and views[0][1] == shortfall for found, shortfall in views)
    whole.write_bytes(whole.read_bytes()[: 10**3])  # another file of that name is another video
    with pytest.raises(VideoReadError, match=r"whole\.mp4: .* bytes, not a readable video"):
        EvaluationViews(SAMPLING, 16, kept)(str(whole))
    with pytest.raises(VideoReadError, match=r"absent\.mp4: no such file"):
        EvaluationViews(SAMPLING, 16, kept)(str(tmp_path / "absent.mp4"))


def test_damaged_decoded_frames_are_decoded_again(tmp_path: Path) -> None:
    path, kept = write_video(tmp_path / "a.mp4", ramp(20)), Cache(decoded=tmp_path / "decoded")
    first, _ = EvaluationViews(SAMPLING, 16, kept)(str(path))
    (file,) = (tmp_path / "decoded").iterdir()
    content = file.read_bytes()
    for damaged in (b"", content[:100], content[:-1], content[:5000] + bytes([content[5000] ^ 1]) + content[5001:]):
        file.write_bytes(damaged)
        again, _ = EvaluationViews(SAMPLING, 16, kept)(str(path))
        assert np.array_equal(again, first)
        assert file.read_bytes() == content
