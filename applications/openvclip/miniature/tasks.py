"""The video sets of the miniature: one to fine-tune on, and those that show what fine-tuning gained and lost.

| set | classes | what it stands for |
|---|---|---|
| train, closed | 30 objects x 2 motions each | Kinetics-400: the closed label set |
| zs_object | 100 other objects | UCF-101: same domain, new classes |
| zs_motion | 20 other objects x 5 motions | HMDB-51: needs more than one frame |
| zs_colour | 15 other objects x 8 colours | knowledge of CLIP that the closed set never asks for |
| images | all 320 concepts, clean stills | ImageNet: the open vocabulary itself |
| out_of_context | those of train, before another of their objects | UCF-SCUBA: a background that misleads |

Videos are real .mp4 files, made once and kept in a cache folder; a still is a video of one frame.
"""

from __future__ import annotations

import csv
import hashlib
import io
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import torch
from rich.console import Console

from applications.openvclip.data.manifest import Manifest, read_manifest
from applications.openvclip.data.storage import cache_root
from applications.openvclip.miniature import glyphs, world
from applications.openvclip.progress import progress_bar
from applications.openvclip.runs.texts import write_text

ENLARGED = 2  # a pixel of the world is 2 x 2 in the file, so that chroma subsampling costs no detail
FRAME_RATE = 16
# without the macroblock tree: x264's vector code for it gives, with small frames, now and then another file
ENCODER = {"preset": "veryfast", "crf": "10", "threads": "1", "x264-params": "mbtree=0"}
ZERO_SHOT_SETS = ("zs_object", "zs_motion", "zs_colour", "images")
TEST_SETS = ("closed", *ZERO_SHOT_SETS)


@dataclass(frozen=True)
class ClipRecipe:
    """One video to be made; `key` seeds everything random in it."""

    file: str
    label: str
    concept: int
    motion: str | None
    """None is a clean still."""
    colour: str | None
    hardness: float
    key: tuple[int, int, int]
    behind: int | None = None
    """The concept of another class in the background."""


def draw_sets(seed: int, train_videos_per_class: int) -> dict[str, list[ClipRecipe]]:
    """The sets of a seed: which concepts, motions and colours, a function of the arguments alone."""
    rng = np.random.default_rng([seed, 0])
    order = rng.permutation(glyphs.N_GLYPHS).tolist()
    seen, objects, moving, coloured = order[:30], order[30:130], order[130:150], order[150:165]
    names = glyphs.names()
    closed = [
        (f"{motion} {names[c]}", c, motion, None)
        for c in seen
        for motion in rng.choice(world.MOTIONS, size=2, replace=False).tolist()
    ]
    motion_classes = [(f"{motion} {names[c]}", c, motion, None) for c in moving for motion in world.MOTIONS]
    colour_classes = [(f"{colour} {names[c]}", c, "", colour) for c in coloured for colour in world.FOREGROUNDS]
    object_classes = [(names[c], c, "", None) for c in objects]
    image_classes = [(names[c], c, None, None) for c in range(glyphs.N_GLYPHS)]

    sets = {}
    for number, (name, classes, videos_per_class, hardness) in enumerate(
        [
            ("train", closed, train_videos_per_class, 0.8),
            ("closed", closed, 8, 0.8),
            ("zs_object", object_classes, 4, 0.8),
            ("zs_motion", motion_classes, 4, 0.8),
            ("zs_colour", colour_classes, 3, 0.35),
            ("images", image_classes, 2, 0.0),
            ("out_of_context", closed, 4, 0.8),
        ]
    ):
        sets[name] = [
            ClipRecipe(
                file=f"{label.replace(' ', '_')}/{i}.mp4",
                label=label,
                concept=concept,
                motion=str(rng.choice(world.MOTIONS)) if motion == "" else motion,
                colour=colour,
                hardness=hardness,
                key=(seed, 1 + number, index * videos_per_class + i),
                behind=int(rng.choice([c for c in seen if c != concept])) if name == "out_of_context" else None,
            )
            for index, (label, concept, motion, colour) in enumerate(classes)
            for i in range(videos_per_class)
        ]
    return sets


def render(recipe: ClipRecipe) -> np.ndarray:
    """The frames of a video: (T, 32, 32, 3) uint8."""
    rng = np.random.default_rng(recipe.key)
    if recipe.motion is None:
        image, _ = world.stills(rng, np.array([recipe.concept]))
        return (image * 255).round().byte().permute(0, 2, 3, 1).numpy()
    return world.clip(rng, recipe.concept, recipe.motion, recipe.colour, recipe.hardness, recipe.behind)


def write_video(path: Path, frames: np.ndarray) -> None:
    """Write frames (T, 32, 32, 3) as a 64 x 64 h264 file; a file of that name is always whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with av.open(str(temporary), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=FRAME_RATE, options=ENCODER)
        stream.height, stream.width = frames.shape[1] * ENLARGED, frames.shape[2] * ENLARGED
        stream.pix_fmt = "yuv420p"
        for frame in frames.repeat(ENLARGED, axis=1).repeat(ENLARGED, axis=2):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    temporary.replace(path)


def cache_folder(seed: int, train_videos_per_class: int) -> Path:
    """Where the sets of a seed are kept; another recipe, that is another source of this world, is another folder."""
    recipe = hashlib.sha256(f"{seed} {train_videos_per_class}".encode())
    for source in (Path(__file__), Path(world.__file__), glyphs.ATLAS, glyphs.LIST):
        recipe.update(source.read_bytes())
    return cache_root() / "miniature" / recipe.hexdigest()[:16]


def prepare(seed: int, train_videos_per_class: int = 48, console: Console | None = None) -> dict[str, Manifest]:
    """The manifests of all sets of a seed; videos that are not in the cache yet are made first, on all cores.

    An interrupted run leaves whole files only, and the next one makes what is missing.
    """
    folder = cache_folder(seed, train_videos_per_class)
    sets = draw_sets(seed, train_videos_per_class)
    missing = {name: recipes for name, recipes in sets.items() if not (folder / name / "manifest.csv").exists()}
    if missing:
        with progress_bar(console) as progress:
            task = progress.add_task("making videos", total=sum(map(len, missing.values())))
            # a fresh interpreter for each worker: forking a process that already runs torch's threads can hang
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(mp_context=context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
                for name, recipes in missing.items():
                    for done in pool.map(_write_chunk, _chunks(folder / name, recipes)):
                        progress.advance(task, done)
                    _write_manifest(folder / name / "manifest.csv", recipes)
    return {
        name: read_manifest(
            folder / name / "manifest.csv",
            classes=list(dict.fromkeys(recipe.label for recipe in recipes)),
            name=f"miniature/{name}",
        )
        for name, recipes in sets.items()
    }


def _chunks(folder: Path, recipes: list[ClipRecipe], size: int = 32) -> Iterator[tuple[Path, list[ClipRecipe]]]:
    for first in range(0, len(recipes), size):
        yield folder, recipes[first : first + size]


def _write_chunk(chunk: tuple[Path, list[ClipRecipe]]) -> int:
    folder, recipes = chunk
    for recipe in recipes:
        path = folder / recipe.file
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_video(path, render(recipe))
    return len(recipes)


def _write_manifest(path: Path, recipes: list[ClipRecipe]) -> None:
    """A manifest whose paths are relative, so that the cache can be moved."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(("path", "label"))
    writer.writerows((recipe.file, recipe.label) for recipe in recipes)
    write_text(path, text.getvalue())
