"""Files that people drop on a page, and that it can't take."""

from pathlib import Path

import av
import numpy as np

BAD = {
    "notes.mp4": "no video that can be read here",
    "empty.mp4": "is empty",
    "long.mp4": r"is 10\.0 minutes long; up to 5 are taken",
    "eight_k.mp4": "is 7680 x 4320 pixels; up to 4096",
    "torn.mp4": "no video that can be read here",
    "sound.mp4": "no picture",
}
"""What each is told."""


def write_clip(path: Path, *, seconds: float, rate: int = 16, size: tuple[int, int] = (64, 64)) -> Path:
    """A video of changing grey."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate, options={"preset": "ultrafast", "g": "100"})
        stream.width, stream.height = size
        for i in range(round(seconds * rate)):
            grey = np.full((size[1], size[0], 3), 40 + i % 160, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
        container.mux(stream.encode())
    return path


def write_bad(name: str, folder: Path) -> Path:
    """One of `BAD`."""
    path = folder / name
    if name == "notes.mp4":
        path.write_text("a shopping list\n" * 100)
    elif name == "empty.mp4":
        path.touch()
    elif name == "long.mp4":
        write_clip(path, seconds=600, rate=2)
    elif name == "eight_k.mp4":
        write_clip(path, seconds=1, rate=1, size=(7680, 4320))
    elif name == "torn.mp4":  # what lies at its end says where everything is
        whole = write_clip(path, seconds=5).read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
    elif name == "sound.mp4":
        with av.open(str(path), "w") as container:
            stream = container.add_stream("aac", rate=16000, layout="mono")
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate = 16000
            container.mux(stream.encode(frame))
            container.mux(stream.encode())
    return path
