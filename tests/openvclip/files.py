"""Files made for tests: real videos, written by PyAV, manifests, and weights."""

import csv
from pathlib import Path

import av
import numpy as np
import torch
from safetensors.torch import save_file

from applications.openvclip.miniature import tasks, tiny_clip


def write_video(
    path: Path,
    frames: np.ndarray,
    codec: str = "libx264",
    rate: int = 25,
    pixel_format: str = "yuv420p",
    **options: str,
) -> Path:
    """A video file of frames (T, H, W, 3) uint8."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pixel_format
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


def numbered(n_frames: int, height: int = 96, width: int = 128) -> np.ndarray:
    """Moving texture, with the index of each frame written in black and white squares along its upper edge."""
    texture = np.random.default_rng(0).integers(0, 255, (height // 8, width // 8, 3), dtype=np.uint8)
    texture = texture.repeat(8, axis=0).repeat(8, axis=1)
    frames = np.stack([np.roll(texture, 3 * i, axis=1) for i in range(n_frames)])
    for i, frame in enumerate(frames):
        for bit in range(8):
            frame[:8, 8 * bit : 8 * bit + 8] = 255 * (i >> bit & 1)
    return frames


def numbers(frames: np.ndarray) -> list[int]:
    """The indices that are written in frames of `numbered`."""
    return [sum(int(frame[2:6, 8 * b + 2 : 8 * b + 6].mean() > 128) << b for b in range(8)) for frame in frames]


def cut_off(path: Path) -> Path:
    """A video of 60 frames of which about a half is there, as of a download that broke off."""
    write_video(path, ramp(60, 240, 320), "mpeg4", g="10")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def write_small_world(root: Path) -> dict[str, Path]:
    """Manifests of a few classes of the miniature: 4 classes to train on, and two sets to test on."""
    sets = tasks.draw_sets(seed=0, train_videos_per_class=4)
    manifests = {}
    for name, classes in (("train", 4), ("closed", 4), ("zs_object", 6)):
        labels = list(dict.fromkeys(recipe.label for recipe in sets[name]))[:classes]
        recipes = [recipe for recipe in sets[name] if recipe.label in labels]
        for recipe in recipes:
            path = root / name / recipe.file
            path.parent.mkdir(parents=True, exist_ok=True)
            tasks.write_video(path, tasks.render(recipe))
        manifests[name] = write_manifest(root / name / "manifest.csv", [(r.file, r.label) for r in recipes])
    return manifests


def write_theta(path: Path, *, change: float = 0.02, scale: float = 0) -> Path:
    """Fine-tuned weights of the tiny CLIP, in a file: the image tower changed by noise, and the logarithmic scale."""
    generator = torch.Generator().manual_seed(0)
    whole = tiny_clip.load().state_dict()
    tuned = {n: w + change * torch.randn(w.shape, generator=generator) for n, w in whole.items() if "visual." in n}
    save_file(whole | tuned | {"logit_scale": whole["logit_scale"] + scale}, path)
    return path
