"""Files made for tests: real videos, written by PyAV, and manifests."""

import csv
from pathlib import Path

import av
import numpy as np


def write_video(path: Path, frames: np.ndarray, codec: str = "libx264", rate: int = 25, **options: str) -> Path:
    """A video file of frames (T, H, W, 3) uint8."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


def ramp(n_frames: int, height: int = 48, width: int = 64) -> np.ndarray:
    """Frames that tell their index: frame i is a grey of 8 * i."""
    levels = (8 * np.arange(n_frames)).clip(0, 255).astype(np.uint8)
    return np.broadcast_to(levels[:, None, None, None], (n_frames, height, width, 3)).copy()


def write_manifest(path: Path, rows: list[tuple[str, str]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("path", "label"), *rows])
    return path
