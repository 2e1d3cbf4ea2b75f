"""From a manifest to batches: files, frames, transforms, order."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from applications.openvclip.data import transforms
from applications.openvclip.data.dataset import ClipFormat, EvaluationViews, TrainingClips
from applications.openvclip.data.decode import Video, VideoReadError
from applications.openvclip.data.loader import TrainingOrder, evaluation_loader, training_loader
from applications.openvclip.data.manifest import Manifest, read_manifest
from applications.openvclip.data.sampling import dense_clip, view_starts
from applications.openvclip.data.transforms import Augmentation, Normalisation
from applications.openvclip.model.video_encoder import VideoEncoder
from tests.openvclip.files import ramp, write_manifest, write_video

PLAIN = Normalisation((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def clip_format(**changes) -> ClipFormat:
    return ClipFormat(**{"frames": 4, "stride": 4, "target_fps": None, "size": 32, "normalisation": PLAIN} | changes)


# manifest


def test_labels_are_indices_of_the_sorted_classes(tmp_path: Path) -> None:
    manifest = read_manifest(write_manifest(tmp_path / "ucf" / "m.csv", [("a.mp4", "surfing"), ("b/c.mp4", "archery")]))
    assert manifest.name == "ucf"
    assert manifest.classes == ("archery", "surfing")
    assert manifest.labels == (1, 0)
    assert manifest.paths[1] == tmp_path / "ucf" / "b" / "c.mp4"


def test_a_misspelt_label_is_named_with_its_line_and_the_nearest_class(tmp_path: Path) -> None:
    path = write_manifest(tmp_path / "m.csv", [("a.mp4", "archery"), ("b.mp4", "archrey")])
    with pytest.raises(ValueError, match=r"line 3: 'archrey' is not one of the 2 classes\. Did you mean 'archery'\?"):
        read_manifest(path, classes=["archery", "surfing"])


def test_a_manifest_without_columns_or_rows_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text("a.mp4,archery\n")
    with pytest.raises(ValueError, match=r"must name the columns path and label, got \['a.mp4', 'archery'\]"):
        read_manifest(tmp_path / "m.csv")
    with pytest.raises(ValueError, match="no video in it"):
        read_manifest(write_manifest(tmp_path / "m.csv", []))
    with pytest.raises(FileNotFoundError, match=r"absent\.csv"):
        read_manifest(tmp_path / "absent.csv")


# decoding


@pytest.mark.parametrize(
    ("name", "codec"), [("a.mp4", "libx264"), ("a.avi", "mpeg4"), ("a.mkv", "libx265"), ("a.webm", "libvpx-vp9")]
)
def test_frames_are_those_that_were_asked_for(tmp_path: Path, name: str, codec: str) -> None:
    video = Video(write_video(tmp_path / name, ramp(24), codec))
    assert len(video) == 24
    assert video.frames_per_second == pytest.approx(25)
    frames = video.frames([20, 3, 3, 0])
    assert frames.shape == (4, 48, 64, 3)
    assert frames.dtype == np.uint8
    # the codecs are lossy, but neighbouring frames differ by 8
    np.testing.assert_allclose(frames.mean(axis=(1, 2, 3)), [160, 24, 24, 0], atol=3)


@pytest.mark.parametrize("content", [b"", b"no video at all", b"\x00" * 4096])
def test_what_is_no_video_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.mp4"
    path.write_bytes(content)
    with pytest.raises(VideoReadError, match=rf"broken\.mp4: {len(content)} bytes, not a readable video"):
        Video(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(VideoReadError, match=r"absent\.mp4: no such file"):
        Video(tmp_path / "absent.mp4")


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", ramp(64, 240, 320))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(VideoReadError, match=r"a\.mp4"):
        Video(path).frames([0, 63])


def test_the_published_corrupt_clip_is_named(real_videos: Path) -> None:
    with pytest.raises(VideoReadError, match=r"decord_corrupted\.mp4"):
        clip_format(frames=5, stride=12).read(Video(real_videos / "decord_corrupted.mp4"), start=0)


@pytest.mark.parametrize("name", ["mmaction_test.avi", "k400_arm_wrestling.mp4", "tc_av1_video.mkv"])
def test_a_real_clip_goes_through_dataset_and_encoder(real_videos: Path, source, name: str) -> None:
    manifest = Manifest("real", (real_videos / name,), (0,), ("arm wrestling",))
    normalisation = Normalisation(source.image_mean, source.image_std)
    views, _ = EvaluationViews(manifest, clip_format(normalisation=normalisation, target_fps=30), views=3)[0]
    assert views.shape == (3, 3, 4, 32, 32)
    with torch.no_grad():
        features = VideoEncoder(source.clip).encode(views)
    assert features.shape == (3, 4, 128)
    assert features.isfinite().all()
    assert not torch.equal(features[0], features[2])


# sampling


@given(
    n_frames=st.integers(1, 500),
    frames=st.integers(1, 40),
    stride=st.floats(0.1, 50),
    start=st.floats(0, 1),
)
def test_indices_ascend_inside_the_video(n_frames: int, frames: int, stride: float, start: float) -> None:
    indices = dense_clip(n_frames, frames=frames, stride=stride, start=start)
    assert indices.shape == (frames,)
    assert (np.diff(indices) >= 0).all()
    assert indices[0] >= 0
    assert indices[-1] < n_frames
    span = (frames - 1) * stride
    if span <= n_frames - 1:
        assert indices[-1] - indices[0] == pytest.approx(span, abs=1)
    else:
        assert indices[0] == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [({"n_frames": 0}, "got 0, 4 and 2"), ({"stride": float("nan")}, "nan"), ({"start": 1.5}, r"\[0, 1\], got 1.5")],
)
def test_impossible_clips_are_refused(change: dict, message: str) -> None:
    arguments = {"n_frames": 10, "frames": 4, "stride": 2, "start": 0.0} | change
    with pytest.raises(ValueError, match=message):
        dense_clip(arguments.pop("n_frames"), **arguments)


def test_views_are_spread_evenly() -> None:
    assert view_starts(1).tolist() == [0.5]
    assert view_starts(3).tolist() == [0.0, 0.5, 1.0]


def test_stride_counts_at_the_target_frame_rate(tmp_path: Path) -> None:
    video = Video(write_video(tmp_path / "a.mp4", ramp(30), rate=10))
    frames = clip_format(frames=3, stride=6, target_fps=30).read(video, start=0)
    np.testing.assert_allclose(frames.mean(axis=(1, 2, 3)), [0, 16, 32], atol=3)  # 6 at 30 a second are 2 at 10


def test_a_short_video_is_padded_by_its_last_frame(tmp_path: Path) -> None:
    video = Video(write_video(tmp_path / "a.mp4", ramp(3)))
    frames = clip_format(frames=4, stride=2).read(video, start=0.7)
    np.testing.assert_allclose(frames.mean(axis=(1, 2, 3)), [0, 16, 16, 16], atol=3)


# transforms


@given(
    height=st.integers(20, 60), width=st.integers(20, 60), size=st.sampled_from([8, 17, 20]), seed=st.integers(0, 999)
)
def test_all_frames_of_a_clip_are_augmented_alike(height: int, width: int, size: int, seed: int) -> None:
    frame = np.random.default_rng(seed).integers(0, 256, (1, height, width, 3), dtype=np.uint8)
    clip = transforms.training_clip(
        frame.repeat(3, axis=0),
        size=size,
        normalisation=PLAIN,
        augmentation=Augmentation(max_short_side=1.3, horizontal_flip=True, colour_jitter=0.4),
        rng=np.random.default_rng(seed),
    )
    assert clip.shape == (3, 3, size, size)
    assert 0 <= clip.min() <= clip.max() <= 1
    assert torch.equal(clip[:, 0], clip[:, 1])
    assert torch.equal(clip[:, 0], clip[:, 2])


def test_half_of_the_clips_are_mirrored() -> None:
    frames = np.arange(8, dtype=np.uint8).reshape(1, 1, 8, 1).repeat(8, axis=1).repeat(3, axis=3)
    mirrored = 0
    for seed in range(100):
        clip = transforms.training_clip(
            frames,
            size=8,
            normalisation=PLAIN,
            augmentation=Augmentation(horizontal_flip=True),
            rng=np.random.default_rng(seed),
        )
        mirrored += bool(clip[0, 0, 0, 0] > clip[0, 0, 0, -1])
    assert 30 < mirrored < 70


def test_pixels_have_the_mean_and_deviation_that_the_model_expects() -> None:
    frames = np.full((2, 10, 20, 3), 255, dtype=np.uint8)
    clip = transforms.evaluation_clip(frames, size=8, normalisation=Normalisation((0.5, 0.0, 0.0), (0.25, 1.0, 2.0)))
    assert clip.shape == (3, 2, 8, 8)
    torch.testing.assert_close(clip[:, 0, 0, 0], torch.tensor([2.0, 1.0, 0.5]))


def test_without_augmentation_a_training_clip_is_the_test_clip() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (2, 24, 24, 3), dtype=np.uint8)
    clip = transforms.training_clip(
        frames, size=12, normalisation=PLAIN, augmentation=Augmentation(), rng=np.random.default_rng(0)
    )
    assert torch.equal(clip, transforms.evaluation_clip(frames, size=12, normalisation=PLAIN))


# order


@given(
    samples=st.integers(1, 50),
    batch_size=st.integers(1, 50),
    epochs=st.integers(1, 3),
    seed=st.integers(0, 9),
    data=st.data(),
)
def test_a_resumed_order_is_the_rest_of_the_whole_order(samples, batch_size, epochs, seed, data) -> None:
    batch_size = min(batch_size, samples)
    whole = TrainingOrder(samples, batch_size, seed, 0, epochs * (samples // batch_size))
    batches = list(whole)
    assert len(batches) == len(whole)
    for epoch in range(epochs):
        of_epoch = [key for batch in batches for key in batch if key[0] == epoch]
        assert len(of_epoch) == len(set(of_epoch)) == whole.steps_per_epoch * batch_size
    first = data.draw(st.integers(0, len(batches)))
    assert list(TrainingOrder(samples, batch_size, seed, first, len(batches))) == batches[first:]


def test_every_epoch_has_an_order_of_its_own() -> None:
    batches = list(TrainingOrder(20, 20, seed=0, first_step=0, last_step=2))
    first, second = ([i for _, i in batch] for batch in batches)
    assert sorted(first) == sorted(second) == list(range(20))
    assert first != second != sorted(second)


def test_a_batch_larger_than_the_set_is_refused() -> None:
    with pytest.raises(ValueError, match=r"from 1 to the number of videos, 3, got 4"):
        TrainingOrder(3, 4, 0, 0, 1)


def test_batches_do_not_depend_on_the_number_of_workers(small_world: dict[str, Path]) -> None:
    manifest = read_manifest(small_world["train"])
    clips = TrainingClips(manifest, clip_format(), Augmentation(1.3, True, 0.4), seed=3)
    order = TrainingOrder(len(manifest), 5, 3, 1, 5)
    alone, with_workers = (list(training_loader(clips, order, workers)) for workers in (0, 2))
    assert len(alone) == 4
    for (a, a_labels), (b, b_labels) in zip(alone, with_workers, strict=True):
        assert a.shape == (5, 3, 4, 32, 32)
        assert torch.equal(a, b)
        assert torch.equal(a_labels, b_labels)


def test_test_batches_hold_every_video_once_in_order(small_world: dict[str, Path]) -> None:
    manifest = read_manifest(small_world["zs_object"])
    batches = list(evaluation_loader(EvaluationViews(manifest, clip_format(), views=2), batch_size=10, workers=1))
    assert [len(labels) for _, labels in batches] == [10, 10, 4]
    assert batches[0][0].shape == (10, 2, 3, 4, 32, 32)
    assert torch.cat([labels for _, labels in batches]).tolist() == list(manifest.labels)


def test_an_unreadable_video_in_a_worker_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.mp4").write_bytes(b"nothing")
    manifest = Manifest("m", (tmp_path / "broken.mp4",), (0,), ("a",))
    with pytest.raises(VideoReadError, match=re.escape("broken.mp4: 7 bytes, not a readable video")):
        list(evaluation_loader(EvaluationViews(manifest, clip_format()), 1, workers=1))
