"""Frames by index out of real files of many codecs, and clear errors for what is no video."""

import re
import shutil
import wave
from fractions import Fraction
from itertools import islice
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from applications.openvclip.data import decode
from applications.openvclip.data.decode import Video, VideoReadError
from applications.openvclip.data.sampling import Sampling
from applications.openvclip.data.storage import Cache
from applications.openvclip.data.views import EvaluationViews
from tests.openvclip.files import numbered, numbers, ramp, write_video

CODECS = [
    ("a.mp4", "libx264", {}),
    ("groups.mp4", "libx264", {"g": "10"}),
    ("open_groups.mp4", "libx264", {"x264-params": "open-gop=1:keyint=12:bframes=3"}),
    ("a.mkv", "libx265", {"x265-params": "log-level=none"}),
    ("open_groups.mkv", "libx265", {"x265-params": "keyint=12:open-gop=1:log-level=none"}),
    ("a.avi", "mpeg4", {}),
    ("b_frames.avi", "mpeg4", {"bf": "2"}),
    ("b_frames.mp4", "mpeg4", {"bf": "2"}),
    ("h264.avi", "libx264", {"g": "12"}),
    ("a.ts", "libx264", {"g": "12"}),
    ("a.webm", "libvpx-vp9", {"g": "12", "deadline": "realtime"}),
    ("av1.mp4", "libsvtav1", {"g": "12", "preset": "12"}),
]


@pytest.mark.parametrize(("name", "codec", "options"), CODECS, ids=[name for name, _, _ in CODECS])
def test_frames_are_those_that_were_asked_for(tmp_path: Path, name: str, codec: str, options: dict[str, str]) -> None:
    path = write_video(tmp_path / name, numbered(60), codec, 25, **options)
    video = Video(path)
    assert len(video) == 60
    assert video.frames_per_second == pytest.approx(25, rel=1e-3)
    rng = np.random.default_rng(0)
    for wanted in ([59], [3, 7], [50, 3, 3, 0], *(np.sort(rng.integers(0, 60, 6)).tolist() for _ in range(8))):
        frames = video.frames(wanted)
        assert frames.shape == (len(wanted), 96, 128, 3)
        assert frames.dtype == np.uint8
        assert numbers(frames) == wanted


@pytest.mark.parametrize(
    ("name", "frames", "size"),
    [
        ("k400_arm_wrestling.mp4", 280, (256, 340)),
        ("k400_flipping_pancake.mkv", 310, (240, 426)),
        ("mmaction_test.avi", 164, (240, 320)),
        ("part_0.mp4", 32, (256, 340)),
        ("tc_av1_video.mkv", 125, (360, 640)),
        ("tc_h264_10bits.mp4", 30, (200, 200)),
        ("tc_h265_video.mp4", 10, (128, 128)),
        ("decord_video_90.mov", 3, (568, 320)),
    ],
)
def test_real_clips_equal_a_plain_decoding_from_start_to_end(
    real_videos: Path, name: str, frames: int, size: tuple[int, int]
) -> None:
    path = real_videos / name
    video = Video(path)
    assert (len(video), video.size) == (frames, size)
    with av.open(str(path)) as container:
        whole = [np.rot90(f.to_ndarray(format="rgb24"), f.rotation // 90) for f in container.decode(video=0)]
    wanted = [frames - 1, 0, frames // 2]
    for got, i in zip(video.frames(wanted).astype(int), wanted, strict=True):
        differences = [np.abs(got - other).mean() for other in whole]
        # of 10-bit pictures, to_ndarray gives two pixels one colour; all others are equal bit for bit
        assert differences[i] == min(differences) <= (4 if "10bits" in name else 0)


def rotated(path: Path, degrees: int, source: Path) -> Path:
    """The file again, with the order to turn it."""
    with av.open(str(source)) as given, av.open(str(path), "w") as container:
        stream = container.add_stream_from_template(given.streams.video[0])
        stream.set_display_rotation(degrees)
        for packet in given.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                container.mux(packet)
    return path


@pytest.mark.parametrize("degrees", [90, 180, -90])
def test_rotation_is_honoured_at_any_size(tmp_path: Path, degrees: int) -> None:
    frames = numbered(12)
    plain = write_video(tmp_path / "plain.mp4", frames)
    video = Video(rotated(tmp_path / "turned.mp4", degrees, plain))
    upright = np.rot90(Video(plain).frames([5])[0], degrees // 90)
    assert video.frames([5]).shape[1:] == upright.shape
    assert np.abs(video.frames([5])[0].astype(int) - upright).mean() < 1
    small = Video(video.path, short_side=48)
    assert small.frames([5, 7]).shape == (2, *small.size, 3)
    assert min(small.size) == 48
    assert np.abs(small.frames([5])[0, ::2].mean() - upright.mean()) < 2


@pytest.mark.parametrize(("height", "width", "short_side"), [(96, 128, 48), (128, 96, 33), (48, 64, 224), (64, 64, 32)])
@pytest.mark.parametrize(("name", "codec"), [("a.mp4", "libx264"), ("a.avi", "mjpeg")])
def test_frames_are_resized_while_decoding(tmp_path: Path, height, width, short_side, name, codec) -> None:
    pixel_format = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    video = Video(write_video(tmp_path / name, ramp(20, height, width), codec, pixel_format=pixel_format), short_side)
    frames = video.frames([2, 16])
    assert min(frames.shape[1:3]) == short_side
    assert max(frames.shape[1:3]) == round(max(height, width) * short_side / min(height, width))
    np.testing.assert_allclose(frames.mean(axis=(1, 2, 3)), [16, 128], atol=3)


@pytest.mark.parametrize(("name", "short_side"), [("part_0.mp4", 224), ("part_0.mp4", 32), ("mmaction_test.avi", 225)])
def test_resized_frames_are_those_of_an_antialiased_bicubic(real_videos: Path, name: str, short_side: int) -> None:
    path = real_videos / name
    got = Video(path, short_side).frames([7])[0]
    with av.open(str(path)) as container:
        frame = next(islice(container.decode(video=0), 7, None))
    whole = frame.reformat(format="yuv444p", interpolation="BICUBIC").to_ndarray(format="rgb24")
    expected = np.asarray(Image.fromarray(whole).resize(got.shape[1::-1], Image.Resampling.BICUBIC))
    assert np.abs(got.astype(float) - expected).mean() < 1  # of 255


def test_ten_bit_video_has_its_colours(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", ramp(20), pixel_format="yuv420p10le")
    frames = Video(path).frames([4, 19])
    np.testing.assert_allclose(frames.mean(axis=(1, 2, 3)), [32, 152], atol=3)


def test_frames_of_a_variable_frame_rate_are_counted_in_order(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.height, stream.width, stream.pix_fmt = 96, 128, "yuv420p"
        for i, frame in enumerate(numbered(40)):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture.pts, picture.time_base = i + 5 * (i // 10), Fraction(1, 30)
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    video = Video(path)
    assert len(video) == 40
    assert numbers(video.frames([0, 9, 10, 11, 39])) == [0, 9, 10, 11, 39]
    assert 20 < video.frames_per_second < 30


def test_a_video_of_one_frame_is_a_video(tmp_path: Path) -> None:
    for name, codec in (("a.mp4", "libx264"), ("a.avi", "mpeg4")):
        video = Video(write_video(tmp_path / name, ramp(1), codec))
        assert len(video) == 1
        assert video.frames([0, 0]).shape == (2, 48, 64, 3)


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyError("no"), type("LimitReached", (Exception,), {})("no")])
def test_whatever_a_reader_raises_is_an_unreadable_video(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    path = write_video(tmp_path / "a.mp4", numbered(3))
    video = Video(path)

    def fail(*args: object) -> None:
        raise error

    monkeypatch.setattr(decode.Reader, "read", fail)
    with pytest.raises(VideoReadError, match=r"a\.mp4: frames 1 to 2 of 3 could not be decoded; .* '?no"):
        video.frames([2, 1])
    monkeypatch.setattr(decode, "Reader", fail)
    with pytest.raises(VideoReadError, match=r"a\.mp4: \d+ bytes, not a readable video\. '?no"):
        Video(path)


@pytest.mark.parametrize(
    ("name", "content"),
    [("broken.mp4", b""), ("broken.mp4", b"no video at all"), ("broken.avi", b"\x00" * 4096), ("t.mp4", b"a\n" * 999)],
)
def test_what_is_no_video_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(VideoReadError, match=rf"{name}: {len(content)} bytes, not a readable video"):
        Video(path)


def test_a_file_with_sound_alone_is_named(tmp_path: Path) -> None:
    path = tmp_path / "sound.wav"
    with wave.open(str(path), "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(8000)
        sound.writeframes(bytes(16000))
    with pytest.raises(VideoReadError, match=r"sound\.wav: 16044 bytes, .*There is no video in it"):
        Video(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(VideoReadError, match=r"absent\.mp4: no such file"):
        Video(tmp_path / "absent.mp4")


def test_of_a_file_that_was_cut_off_the_frames_that_are_left_are_used_and_the_rest_is_told(tmp_path: Path) -> None:
    def cut(name: str, codec: str) -> Video:
        path = write_video(tmp_path / name, numbered(60, 240, 320), codec, g="10")
        path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])
        return Video(path)

    with pytest.raises(VideoReadError, match=r"a\.mp4: \d+ bytes, not a readable video"):  # its index is at its end
        cut("a.mp4", "libx264")
    for name, codec, told in (
        ("a.mkv", "libx264", r"1\.\d of the 2\.4 s that it announces are there"),
        ("a.webm", "libvpx", r"1\.\d of the 2\.4 s that it announces are there"),
        ("a.avi", "mpeg4", r"\d\d of the 60 frames that it announces are there"),
        ("a.ts", "libx264", r"it breaks off inside a frame"),
    ):
        video = cut(name, codec)
        assert 20 < len(video) < 45
        assert re.fullmatch(told, video.shortfall)
        first, last = numbers(video.frames([0, len(video) - 2]))
        assert first == 0
        assert len(video) - 2 <= last <= len(video) + 2  # frames that the last ones refer to may be lost


def test_a_damaged_file_gives_an_error_and_no_made_up_frames(real_videos: Path) -> None:
    with pytest.raises(VideoReadError, match=r"decord_corrupted\.mp4: frames 0 to 48 of 50 could not be decoded"):
        Video(real_videos / "decord_corrupted.mp4").frames([0, 12, 24, 36, 48])


@pytest.mark.slow
def test_500_decodes_leak_no_memory(tmp_path: Path) -> None:
    good = [
        write_video(tmp_path / "a.mp4", numbered(20)),
        write_video(tmp_path / "a.avi", numbered(20), "mpeg4"),
    ]
    cut = tmp_path / "cut.mp4"
    shutil.copy(good[0], cut)
    cut.write_bytes(cut.read_bytes()[:-300])

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    def once(i: int) -> None:
        try:
            Video((*good, cut)[i % 3], 64).frames([0, 10, 19])
        except VideoReadError:
            assert i % 3 == 2

    for i in range(60):
        once(i)
    before = resident()
    for i in range(500):
        once(i)
    assert resident() - before < 20_000_000  # 500 of these videos' frames alone would be 90 MB


def test_every_view_of_real_clips_is_read(real_videos: Path) -> None:
    for path in sorted(p for p in real_videos.rglob("*") if p.suffix in (".avi", ".mp4", ".mkv", ".mov")):
        if "corrupted" not in path.name:
            for sampling in (Sampling(8, 16, 30, views=3), Sampling(8, sampler="slowfast-uniform", views=10)):
                views, shortfall = EvaluationViews(sampling, 32, Cache())(str(path))
                assert not shortfall, path
                assert views.shape == (sampling.views, 3, 8, 32, 32), path
