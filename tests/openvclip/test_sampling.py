"""Which frames make a clip: our sampler, the published code's, and that of segments."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from applications.openvclip.data.sampling import SAMPLERS, Sampling, dense_clip, view_starts


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


@given(
    n_frames=st.integers(1, 900),
    frames=st.integers(1, 32),
    stride=st.floats(0.5, 40),
    fps=st.floats(1, 120),
    views=st.integers(1, 10),
    sampler=st.sampled_from(list(SAMPLERS)),
    seed=st.integers(0, 99),
)
def test_every_sampler_stays_inside_the_video_for_any_length(
    n_frames, frames, stride, fps, views, sampler, seed
) -> None:
    sampling = Sampling(frames, stride, 30, sampler, views)
    clips = [sampling.training_clip(n_frames, fps, np.random.default_rng(seed))]
    clips += [sampling.test_clip(n_frames, fps, view) for view in range(views)]
    for indices in clips:
        assert indices.shape == (frames,)
        assert indices.dtype == np.int64
        assert (np.diff(indices) >= 0).all()
        assert 0 <= indices[0] <= indices[-1] < n_frames


@given(
    n_frames=st.integers(1, 900),
    frames=st.integers(1, 32),
    stride=st.integers(1, 40),
    fps=st.sampled_from([10.0, 25.0, 29.97, 30.0, 60.0]),
    views=st.integers(1, 10),
    offset=st.booleans(),
)
def test_the_published_samplers_are_reproduced(n_frames, frames, stride, fps, views, offset) -> None:
    sampling = Sampling(frames, stride, 30, "slowfast-offset" if offset else "slowfast-uniform", views)
    for view in range(views):
        # the published arithmetic, with torch as there: a range of whole clips, then equal steps from end to end
        length = max(1.0, stride * frames / 30 * fps)
        room = max(n_frames - length, 0)
        if not offset:
            first = room * view / views
        elif views == 1:
            first = math.floor(room / 2)
        else:
            first = view * math.floor(room / (views - 1))
        expected = torch.linspace(first, first + length - 1, frames).clamp(0, n_frames - 1).long()
        difference = np.abs(sampling.test_clip(n_frames, fps, view) - expected.numpy())
        assert difference.max() <= 1  # float32 may fall on either side of a whole number
        assert (difference > 0).mean() <= 0.2 or frames < 8


def test_the_published_clips_of_a_ten_second_video_are_these() -> None:
    offset = Sampling(8, 16, 30, "slowfast-offset", 3)
    assert offset.test_clip(300, 30.0, 0).tolist() == [0, 18, 36, 54, 72, 90, 108, 127]
    assert offset.test_clip(300, 30.0, 1).tolist() == [86, 104, 122, 140, 158, 176, 194, 213]
    assert offset.test_clip(300, 30.0, 2)[-1] == 299
    uniform = Sampling(8, 16, 30, "slowfast-uniform", 3)
    assert [uniform.test_clip(300, 30.0, view)[0] for view in range(3)] == [0, 57, 114]
    assert offset.test_clip(300, 60.0, 0)[-1] == 255  # 128 frames at 30 a second are 256 at 60


@pytest.mark.parametrize(
    ("change", "message"),
    [({"n_frames": 0}, "got 0, 4 and 2"), ({"stride": float("nan")}, "nan"), ({"start": 1.5}, r"\[0, 1\], got 1.5")],
)
def test_impossible_clips_are_refused(change: dict, message: str) -> None:
    arguments = {"n_frames": 10, "frames": 4, "stride": 2, "start": 0.0} | change
    with pytest.raises(ValueError, match=message):
        dense_clip(arguments.pop("n_frames"), **arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frames": 0}, "got 0, 3 and 16"),
        ({"crops": 2}, "crops must be 1 or 3, got 2"),
        ({"sampler": "random"}, "dense, slowfast-offset, slowfast-uniform, segment, got 'random'"),
        ({"target_fps": 0.0}, "target_fps must be positive and finite, got 0"),
        ({"target_fps": np.inf}, "target_fps must be positive and finite, got inf"),
        ({"stride": np.inf}, "stride must be positive and finite, got 8, 3 and inf"),
    ],
)
def test_impossible_samplings_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**change)


def test_views_are_spread_evenly() -> None:
    assert view_starts(1).tolist() == [0.5]
    assert view_starts(3).tolist() == [0.0, 0.5, 1.0]


def test_stride_counts_at_the_target_frame_rate() -> None:
    sampling = Sampling(frames=3, stride=6, target_fps=30, sampler="dense", views=2)
    assert sampling.test_clip(30, 10.0, 0).tolist() == [0, 2, 4]  # 6 at 30 a second are 2 at 10


@pytest.mark.parametrize("sampler", ["dense", "slowfast-offset", "slowfast-uniform"])
def test_a_short_video_is_padded_by_its_last_frame(sampler) -> None:
    assert Sampling(5, 2, None, sampler, 1).test_clip(3, 25.0, 0).tolist()[-3:] == [2, 2, 2]


def test_a_segment_gives_one_frame_each() -> None:
    sampling = Sampling(frames=4, sampler="segment", views=2)
    assert sampling.test_clip(40, 30.0, 0).tolist() == [2, 12, 22, 32]
    assert sampling.test_clip(40, 30.0, 1).tolist() == [7, 17, 27, 37]
    drawn = sampling.training_clip(40, 30.0, np.random.default_rng(0))
    assert (drawn // 10).tolist() == [0, 1, 2, 3]
