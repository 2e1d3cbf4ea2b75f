"""What is announced is what a decoding from start to end gives, pixel for pixel, in every kind of file we can make."""

import struct
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import decord
import numpy as np
import pytest
from av.stream import Disposition

from applications.openvclip.data import stream as stream_module
from applications.openvclip.data.decode import Video
from applications.openvclip.data.pixels import Pixels
from tests.openvclip.files import numbered, numbers, ramp, write_video

SHIPPED = Path(__file__).parent / "videos"


def remuxed(source: Path, path: Path, change: Callable[[int, av.Packet], object] = lambda i, packet: True) -> Path:
    """The packets of a file in another; those for which `change` returns False are left out."""
    with av.open(str(source), metadata_errors="replace") as given, av.open(str(path), "w") as container:
        stream = container.add_stream_from_template(given.streams.video[0])
        packets = [packet for packet in given.demux(video=0) if packet.dts is not None]
        for i, packet in enumerate(packets):
            if change(i, packet) is not False:
                packet.stream = stream
                container.mux(packet)
    return path


def plain(
    path: Path,
    codec: str = "libx264",
    options: dict[str, str] | None = None,
    *,
    n: int = 40,
    pixel_format: str = "yuv420p",
    **more: str,
) -> Path:
    return write_video(path, numbered(n), codec, 25, pixel_format, **(options or {}), **more)


def begins_inside_a_group(folder: Path) -> Path:
    path = plain(folder / "whole.ts", g="20")
    content = path.read_bytes()
    path.write_bytes(content[len(content) // 188 // 4 * 188 :])
    return path


def open_groups_cut(folder: Path) -> Path:
    options = {"x265-params": "keyint=12:open-gop=1:bframes=4:log-level=none"}
    whole = plain(folder / "whole.mp4", "libx265", options=options)
    with av.open(str(whole)) as container:
        keys = [i for i, packet in enumerate(container.demux(video=0)) if packet.is_keyframe]
    return remuxed(whole, folder / "cut.mkv", lambda i, _: i >= keys[1])


def hidden_frames(folder: Path) -> Path:
    def change(i: int, packet: av.Packet) -> None:
        if i in (7, 20):
            content = bytes(packet)
            packet.update(bytes([content[0] & ~0x10]) + content[1:])  # show_frame

    return remuxed(plain(folder / "whole.webm", "libvpx"), folder / "a.webm", change)


def decoding_times_for_times(folder: Path) -> Path:
    def change(_: int, packet: av.Packet) -> None:
        packet.pts = packet.dts

    return remuxed(plain(folder / "whole.mp4"), folder / "wrong.mp4", change)


def edit_list(folder: Path) -> Path:
    path, source = folder / "edited.mp4", plain(folder / "whole.mp4", g="20", bf="0")
    with av.open(str(source)) as given, av.open(str(path), "w", options={"avoid_negative_ts": "disabled"}) as made:
        stream = made.add_stream_from_template(given.streams.video[0])
        for packet in given.demux(video=0):
            if packet.pts is not None and packet.dts is not None:
                shift = int(Fraction(7, 25) / packet.time_base)  # what is shown before 0 is left out by an edit list
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, stream
                made.mux(packet)
    return path


def uneven(folder: Path) -> Path:
    path = folder / "uneven.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.height, stream.width, stream.pix_fmt = 96, 128, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for i, pixels in enumerate(numbered(40)):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = 33 * i + i * 7 % 13, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def two_streams(path: Path, first: Path, second: Path, shown: int, mark: Disposition, other: Disposition) -> Path:
    """A file of two streams, of which one is marked."""
    with av.open(str(first)) as a, av.open(str(second)) as b, av.open(str(path), "w") as container:
        streams = [container.add_stream_from_template(source.streams.video[0]) for source in (a, b)]
        for i, stream in enumerate(streams):
            stream.disposition = mark if i == shown else other
        for source, stream in zip((a, b), streams, strict=True):
            for packet in source.demux(video=0):
                if packet.dts is not None:
                    packet.stream = stream
                    container.mux(packet)
    return path


def cover_first(folder: Path) -> Path:
    cover = write_video(folder / "cover.mkv", ramp(1, 90, 90), "mjpeg", pixel_format="yuvj420p")
    video = plain(folder / "video.mp4")
    made = two_streams(folder / "made.mp4", cover, video, 0, Disposition.attached_pic, Disposition.default)
    content = bytearray(made.read_bytes())
    content[content.find(b"tkhd") + 7] &= ~1  # the video is not marked as default
    moov, track, cover_at = (content.find(name) - 4 for name in (b"moov", b"trak", b"udta"))
    end = moov + int.from_bytes(content[moov : moov + 4], "big")
    assert moov < track < cover_at < end == len(content)
    path = folder / "c.mp4"  # FFmpeg's own files have the cover last
    path.write_bytes(content[:track] + content[cover_at:] + content[track:cover_at])
    with av.open(str(path)) as container:
        assert container.streams.video[0].disposition == Disposition.attached_pic
    return path


def preview_first(folder: Path) -> Path:
    preview = write_video(folder / "preview.mp4", ramp(12, 48, 64))
    video = plain(folder / "video.mp4")
    return two_streams(folder / "p.mp4", preview, video, 1, Disposition.default, Disposition(0))


def two_of_a_kind(folder: Path) -> Path:
    other = write_video(folder / "other.mp4", ramp(12, 48, 64))
    return two_streams(folder / "p.mkv", plain(folder / "video.mp4"), other, 0, Disposition(0), Disposition(0))


def mirrored(folder: Path) -> Path:
    path = plain(folder / "mirrored.mp4")
    content = bytearray(path.read_bytes())
    box = content.find(b"tkhd")
    at = box + 8 + (32 if content[box + 4] else 20) + 16
    content[at : at + 36] = struct.pack(">9i", -65536, 0, 0, 0, 65536, 0, 128 << 16, 0, 1 << 30)
    path.write_bytes(content)
    return path


KINDS: dict[str, Callable[[Path], Path]] = {
    "packed B-frames": lambda _: SHIPPED / "cartwheel.avi",
    "packed B-frames in Matroska": lambda f: remuxed(SHIPPED / "cartwheel.avi", f / "a.mkv"),
    "hidden frames, VP8": hidden_frames,
    "hidden frames, VP9": lambda f: plain(
        f / "a.webm", "libvpx-vp9", options={"auto-alt-ref": "1", "lag-in-frames": "20", "b": "100k"}
    ),
    "10 bits, HEVC": lambda f: plain(
        f / "a.mkv", "libx265", pixel_format="yuv420p10le", options={"x265-params": "log-level=none"}
    ),
    "begins inside a group": begins_inside_a_group,
    "no key frame": lambda f: remuxed(plain(f / "a.avi", "mpeg4", g="60"), f / "a.mkv", lambda i, _: i >= 3),
    "open groups, H.264": lambda f: plain(f / "a.mp4", options={"x264-params": "open-gop=1:keyint=12:bframes=3"}),
    "open groups, HEVC, cut": open_groups_cut,
    "recovery points instead of key frames": lambda f: plain(
        f / "a.mp4", options={"x264-params": "intra-refresh=1:keyint=12:bframes=0"}
    ),
    "times of decoding written as times": decoding_times_for_times,
    "edit list": edit_list,
    "uneven times": uneven,
    "cover first": cover_first,
    "preview first": preview_first,
    "two streams of a kind": two_of_a_kind,
    "mirrored": mirrored,
    "interlaced": lambda f: plain(f / "a.mp4", options={"flags": "+ildct+ilme", "x264-params": "tff=1"}),
    "interlaced, MPEG-2": lambda f: plain(f / "a.mpg", "mpeg2video", flags="+ildct+ilme"),
    "transport stream": lambda f: plain(f / "a.ts", g="12"),
    "fragmented": lambda f: plain(f / "a.mp4", g="12", movflags="frag_keyframe+empty_moov"),
    "no time stamps": lambda f: plain(f / "a.h264"),
    "H.264 in AVI": lambda f: plain(f / "a.avi", bf="2"),
    "B-frames in AVI": lambda f: plain(f / "a.avi", "mpeg4", bf="2"),
    "AV1": lambda f: plain(f / "a.mp4", "libsvtav1", preset="12", g="12"),
    "GIF": lambda f: plain(f / "a.gif", "gif", pixel_format="rgb8"),
    "alpha": lambda f: plain(f / "a.webm", "libvpx-vp9", pixel_format="yuva420p", options={"auto-alt-ref": "0"}),
    "grey": lambda f: plain(f / "a.mp4", pixel_format="gray"),
    "10 bits": lambda f: plain(f / "a.mp4", pixel_format="yuv420p10le"),
    "odd size": lambda f: write_video(f / "a.mp4", numbered(12, 97, 131), pixel_format="yuv444p"),
    **{f"{n} frames": lambda f, n=n: plain(f / "a.mkv", n=n) for n in (1, 2, 3)},
}


def check(path: Path) -> Video:
    """Compare all frames, and some alone, with a plain decoding of the stream that is shown."""
    with stream_module.open_container(path) as container:
        pixels = Pixels()
        whole = [pixels(frame).copy() for frame in container.decode(stream_module.shown_stream(container))]
    video = Video(path)
    assert len(video) == len(whole)
    assert video.shortfall == ""
    assert np.array_equal(video.frames(range(len(whole))), whole)
    alone = [[i] for i in (1, 2, 3, len(whole) * 2 // 3, len(whole) - 1) if i < len(whole)]
    for wanted in (*alone, [len(whole) // 2, 0]):
        assert np.array_equal(Video(path).frames(wanted), [whole[i] for i in wanted])
    return video


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_announced_is_what_is_decoded(tmp_path: Path, kind: str) -> None:
    video = check(KINDS[kind](tmp_path))
    assert 0.5 < video.frames_per_second < 60


def test_every_real_clip_is_what_is_announced(real_videos: Path) -> None:
    for path in sorted([*real_videos.glob("*.m??"), *real_videos.glob("*.avi"), *real_videos.glob("hmdb51/*.avi")]):
        if path.name != "decord_corrupted.mp4":
            check(path)


@pytest.mark.parametrize(("pixel_format", "side"), [("yuv420p", None), ("yuv420p", 53), ("yuv420p10le", 53)])
def test_decord_gives_the_same_pixels(tmp_path: Path, pixel_format: str, side: int | None) -> None:
    video = Video(plain(tmp_path / "a.mp4", pixel_format=pixel_format, g="10"), side)
    height, width = video.size
    assert side is None or width % 2 == 1  # of an even width that it makes, decord gives two pixels one colour
    other = decord.VideoReader(str(video.path), width=width, height=height, num_threads=1)
    assert np.array_equal(video.frames([0, 9, 10, 31]), other.get_batch([0, 9, 10, 31]).asnumpy())


def coloured(path: Path, matrix: int, value_range: int, planes: list[np.ndarray], **options: str) -> Path:
    """Ten frames of these Y, U and V planes, lossless, that name their matrix and range."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"qp": "0", **options})
        stream.height, stream.width, stream.pix_fmt = *planes[0].shape, "yuv420p"
        stream.codec_context.colorspace, stream.codec_context.color_range = matrix, value_range
        for _ in range(10):
            frame = av.VideoFrame.from_ndarray(np.concatenate([p.ravel() for p in planes]).reshape(-1, 64), "yuv420p")
            frame.colorspace, frame.color_range = matrix, value_range
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize(("matrix", "red", "blue"), [(1, 0.2126, 0.0722), (6, 0.299, 0.114), (2, 0.299, 0.114)])
@pytest.mark.parametrize("value_range", [0, 1, 2])
def test_colours_are_those_that_the_file_names(tmp_path: Path, matrix, red, blue, value_range) -> None:
    y, u, v = 120, 90, 170
    planes = [np.full(size, value, np.uint8) for size, value in (((48, 64), y), ((24, 32), u), ((24, 32), v))]
    video = Video(coloured(tmp_path / "a.mp4", matrix, value_range, planes))
    # ITU-R BT.601 and BT.709; 2 is "not named", and so is the range 0
    light, colour = (y / 255, 255) if value_range == 2 else ((y - 16) / 219, 224)
    b, r = light + (u - 128) / colour * 2 * (1 - blue), light + (v - 128) / colour * 2 * (1 - red)
    g = (light - red * r - blue * b) / (1 - red - blue)
    expected = np.clip(np.round(255 * np.array([r, g, b])), 0, 255)
    assert np.abs(video.frames([4])[0] - expected).max() <= 2  # the scaler computes in whole numbers


def test_colours_of_interlaced_frames_belong_to_every_second_line(tmp_path: Path) -> None:
    chroma = np.full((24, 32), 90, np.uint8)
    chroma[1::2] = 160
    planes = [np.full((48, 64), 120, np.uint8), chroma, np.full((24, 32), 128, np.uint8)]
    options = {"flags": "+ildct+ilme", "x264-params": "tff=1"}
    blue = Video(coloured(tmp_path / "a.mp4", 6, 1, planes, **options)).frames([4])[0, 8:40, 32, 2].astype(int)
    assert (blue[1::2] - blue[::2] > 80).all()


def test_the_known_lengths_of_the_odd_ones() -> None:
    assert len(Video(SHIPPED / "cartwheel.avi")) == 83


def test_the_stream_that_a_player_shows_is_read(tmp_path: Path) -> None:
    for number, kind in enumerate((cover_first, preview_first, two_of_a_kind)):
        (tmp_path / str(number)).mkdir()
        frames = Video(kind(tmp_path / str(number))).frames([7, 30])
        assert frames.shape == (2, 96, 128, 3)
        assert numbers(frames) == [7, 30]


def test_a_mirrored_video_is_mirrored(tmp_path: Path) -> None:
    frames = Video(mirrored(tmp_path)).frames([5])
    assert numbers(frames[:, :, ::-1]) == [5]


def test_frames_before_the_beginning_of_an_edit_list_are_no_frames(tmp_path: Path) -> None:
    frames = Video(edit_list(tmp_path)).frames([0, 1])
    assert numbers(frames) == [7, 8]


@pytest.mark.parametrize(
    "name", ["12:30:00.mp4", "a::b.mp4", "~x.mp4", "#1.mp4", "50%d.mp4", "a b'.mp4", "ü\udcff.mp4"]
)
def test_a_file_may_be_called_anything(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    content = plain(tmp_path / "a.mp4", n=3).read_bytes()
    folder = tmp_path / "12:30 #%d"
    folder.mkdir()
    (folder / name).write_bytes(content)
    assert numbers(Video(folder / name).frames([2, 0])) == [2, 0]
    monkeypatch.chdir(folder)
    assert numbers(Video(Path(name)).frames([2, 0])) == [2, 0]


def test_titles_of_any_encoding_are_no_matter_with_the_argument_for_them_and_without(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = SHIPPED / "cartwheel.avi"
    with pytest.raises(UnicodeDecodeError):
        av.open(str(path))
    assert len(Video(path)) == 83

    def without_the_argument(file: str, *, _open: Callable = av.open) -> object:  # as PyAV 19 is
        return _open(file, metadata_errors="surrogateescape")

    monkeypatch.setattr(av, "open", without_the_argument)
    assert len(Video(path)) == 83


def timed(path: Path, times: list[int], rate: int, last_duration: int = 0) -> Path:
    """A video whose frames are shown at these milliseconds."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate, options={"bf": "0"})
        stream.height, stream.width, stream.pix_fmt = 96, 128, "yuv420p"
        stream.codec_context.time_base = stream.time_base = Fraction(1, 1000)
        for time, pixels in zip(times, numbered(len(times)), strict=True):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            for packet in stream.encode(frame):
                packet.duration = last_duration if time == times[-1] and last_duration else packet.duration
                container.mux(packet)
        container.mux(stream.encode())
    return path


def test_the_frame_rate_is_that_of_the_time_stamps(tmp_path: Path) -> None:
    steady = [round(1000 * i / 30) for i in range(60)]
    uneven = [t + i * 7 % 13 - 6 * (i > 0) for i, t in enumerate(steady)]
    assert Video(timed(tmp_path / "1000 claimed.mkv", uneven, 1000)).frames_per_second == pytest.approx(30, rel=0.02)
    assert Video(timed(tmp_path / "held.mp4", [*steady, 60_000], 30)).frames_per_second == pytest.approx(30, rel=1e-3)
    assert Video(timed(tmp_path / "film.mkv", [round(1001 * i / 24) for i in range(60)], 24)).frames_per_second == (
        pytest.approx(24000 / 1001, rel=1e-3)
    )


def test_packed_b_frames_cut_into_another_container_keep_their_frames_and_their_rate(tmp_path: Path) -> None:
    source, path = Path(__file__).parent / "videos" / "cartwheel.avi", tmp_path / "cut.mkv"
    with stream_module.open_container(source) as given, av.open(str(path), "w") as container:
        stream = container.add_stream_from_template(given.streams.video[0])
        for i, packet in enumerate(given.demux(given.streams.video[0])):
            if i >= 5 and packet.dts is not None:  # inside the first group
                packet.stream = stream
                container.mux(packet)
    with av.open(str(path)) as container:
        whole = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    video = Video(path)
    assert len(video) == len(whole)
    assert video.frames_per_second == pytest.approx(30, rel=0.01)  # and not the 30,000 of the header
    for i in (0, 1, 7, len(whole) - 1):
        assert np.array_equal(Video(path).frames([i])[0], whole[i])
