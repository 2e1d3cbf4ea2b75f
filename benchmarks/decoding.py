"""What does it cost to read the frames of a clip? This package against a plain decoding, decord and torchcodec.

CPU time of opening a file, finding its length, and reading frames at a short side of 224 pixels: three views of eight
frames, or one, as the published evaluation and training take them, and one clip late in a video of ten minutes that is
made here by repeating the first clip. Each contender reads with one thread. torchcodec is measured where it is
installed, with its own resizing.

python benchmarks/decoding.py /data/k400/val/clip.mp4 /data/UCF-101/clip.avi
"""

from __future__ import annotations

import resource
import statistics
import tempfile
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import av
import decord
import measuring
import numpy as np
import tyro

from applications.openvclip.data.decode import Video
from applications.openvclip.data.pixels import Pixels, scaled
from applications.openvclip.data.sampling import Sampling
from applications.openvclip.data.stream import open_container, shown_stream

try:
    from torchcodec.decoders import VideoDecoder  # pyright: ignore[reportMissingImports] it is optional
except (ImportError, RuntimeError, OSError):  # it needs FFmpeg's libraries of the system
    VideoDecoder: Any = None

SHORT_SIDE = 224
MINUTES = 10
Read = Callable[[Path, list[int]], object]


def main(videos: Annotated[tuple[Path, ...], tyro.conf.Positional] = (), runs: int = 5) -> None:
    """Measure all contenders in turn, and write results/decoding.json.

    Args:
        videos: Clips, the first of H.264, which is repeated for the long video; by default one of ten seconds is made.
        runs: Times that everything is measured; a first time is not counted.
    """
    with tempfile.TemporaryDirectory() as folder:
        results = measure(videos or (textures(Path(folder) / "textures.mp4"),), Path(folder), runs)
    measuring.save(
        "decoding",
        {
            "question": "CPU time of reading frames, and its ratio to a plain decoding from the first frame on",
            "readers": {name: installed(name) for name in ("av", "decord2", "torchcodec")},
            "runs": runs,
            "videos": results,
        },
    )


def measure(videos: Sequence[Path], folder: Path, runs: int) -> dict[str, object]:
    results: dict[str, object] = {}
    sampling = Sampling()
    for path in videos:
        video = Video(path)
        n, rate = len(video), video.frames_per_second
        three = np.concatenate([sampling.test_clip(n, rate, view) for view in range(3)]).tolist()
        results[path.name] = {
            "codec": video.stream.codec,
            "frames": n,
            "size": "{1}x{0}".format(*video.size),
            "three views": compare(path, three, runs),
            "one clip": compare(path, sampling.test_clip(n, rate, 1).tolist(), runs),
        }
    path = repeated(videos[0], folder / "long.mp4")
    video = Video(path)
    late = (int(0.97 * len(video)) + np.arange(8) * 16).tolist()
    results[f"{MINUTES} minutes of {videos[0].name}"] = {
        "frames": len(video),
        "one clip late": compare(path, late, max(2, runs // 2)),
    }
    return results


def compare(path: Path, indices: list[int], runs: int) -> dict[str, object]:
    """Median milliseconds of each contender, and of its ratios to the plain decoding of the same round."""
    contenders: dict[str, Read] = {"plain": plain, "this package": ours, "decord, sorted": by_decord}
    if VideoDecoder is not None:
        contenders["torchcodec"] = by_torchcodec
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    failed: dict[str, object] = {}
    for run in range(runs + 1):
        for name, read in contenders.items():
            if name in failed:
                continue
            before = cpu_seconds()
            try:
                read(path, indices)
            except Exception as error:  # noqa: BLE001 what a reader can't do is a result too
                failed[name] = type(error).__name__
                continue
            if run:
                seconds[name].append(cpu_seconds() - before)
    measured = {
        name: {
            "ms": round(1000 * statistics.median(values), 1),
            "ratio": round(statistics.median(a / b for a, b in zip(values, seconds["plain"], strict=True)), 3),
        }
        for name, values in seconds.items()
        if name not in failed
    }
    return measured | failed


def cpu_seconds() -> float:
    """Of all threads of this process."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def plain(path: Path, indices: list[int]) -> np.ndarray:
    """Count the packets, then decode from the first frame to the last that is wanted."""
    with open_container(path) as container:
        sum(1 for packet in container.demux(shown_stream(container)) if packet.size)
    wanted, found, pixels = set(indices), {}, Pixels(SHORT_SIDE)
    with open_container(path) as container:
        stream = shown_stream(container)
        stream.codec_context.thread_count = 1
        for i, frame in enumerate(container.decode(stream)):
            if i in wanted:
                found[i] = pixels(frame)
                if len(found) == len(wanted):
                    break
    return np.stack([found[i] for i in indices])


def ours(path: Path, indices: list[int]) -> np.ndarray:
    video = Video(path, SHORT_SIDE)
    if len(video) <= indices[-1]:
        raise ValueError(len(video))
    return video.frames(indices)


def by_decord(path: Path, indices: list[int]) -> np.ndarray:
    first = decord.VideoReader(str(path), num_threads=1)[0].shape
    height, width = scaled(first[0], first[1], SHORT_SIDE)
    reader = decord.VideoReader(str(path), width=width, height=height, num_threads=1)
    return reader.get_batch(sorted(set(indices))).asnumpy()


def by_torchcodec(path: Path, indices: list[int]) -> object:
    decoder = VideoDecoder(str(path), num_ffmpeg_threads=1, seek_mode="exact")
    return decoder.get_frames_at(sorted(set(indices)))


def repeated(source: Path, path: Path) -> Path:
    """A video of ten minutes: the packets of a clip again and again, at later times."""
    with av.open(str(source)) as given, av.open(str(path), "w") as made:
        video = shown_stream(given)
        stream = made.add_stream_from_template(video)
        packets = [packet for packet in given.demux(video) if packet.size]
        step = packets[0].duration or 1
        length = step * len(packets)
        copies = [(bytes(p), p.pts or 0, p.dts or 0, p.duration, p.time_base, p.is_keyframe) for p in packets]
        for n in range(round(MINUTES * 60 / float(length * packets[0].time_base))):
            for content, pts, dts, duration, time_base, is_keyframe in copies:
                packet = av.Packet(content)
                packet.pts, packet.dts, packet.duration = pts + n * length, dts + n * length, duration
                packet.time_base, packet.is_keyframe, packet.stream = time_base, is_keyframe, stream
                made.mux(packet)
    return path


def textures(path: Path) -> Path:
    """Ten seconds of a moving texture, as large as a clip of Kinetics."""
    texture = np.random.default_rng(0).integers(0, 255, (32, 44, 3), dtype=np.uint8).repeat(8, axis=0).repeat(8, axis=1)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.height, stream.width, stream.pix_fmt = *texture.shape[:2], "yuv420p"
        for i in range(300):
            frame = av.VideoFrame.from_ndarray(np.roll(texture, (i, 2 * i), (0, 1)), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
