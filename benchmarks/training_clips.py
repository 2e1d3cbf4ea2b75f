"""How much CPU does a training clip of 8 frames of 224 pixels take, and what do smaller videos save?

Opening, decoding, scaling and augmentation as the published recipes train, on one thread: of the videos as they are,
and of copies in H.264 with a short side of 256 pixels and a key frame every second.

python benchmarks/training_clips.py /data/k400/val/clip.mp4 …
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated

import av
import measuring
import torch
import tyro
from decoding import textures

from applications.openvclip.data.manifest import Manifest
from applications.openvclip.data.pixels import scaled
from applications.openvclip.data.storage import Cache
from applications.openvclip.data.training_clips import TrainingClips
from applications.openvclip.recipes import vit_b_16


def main(videos: Annotated[tuple[Path, ...], tyro.conf.Positional] = (), runs: int = 7) -> None:
    """Measure, and write results/training_clips.json.

    Args:
        videos: Clips as long as those of the data set meant; by default one of ten seconds is made.
        runs: Clips of each video, at random places, as in so many epochs; a first one is not counted.
    """
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        results = {}
        for path in videos or (textures(Path(folder) / "textures.mp4"),):
            small = resized(path, Path(folder) / f"small {path.stem}.mp4", 256, keys_every_s=1)
            results[path.name] = {
                "as it is": described(path, runs),
                "short side 256, a key frame every second": described(small, runs),
            }
    measuring.save("training_clips", {"runs": runs, "videos": results})


def described(path: Path, runs: int) -> dict[str, float]:
    clips = training_clips(path)
    milliseconds = []
    for epoch in range(runs + 1):
        began = time.process_time()
        clips((epoch, 0, 0))
        if epoch:
            milliseconds.append(1000 * (time.process_time() - began))
    low, median, high = statistics.quantiles(milliseconds, n=4)
    return {
        "ms of CPU": round(median, 1),
        "quartile_1": round(low, 1),
        "quartile_3": round(high, 1),
        "megabytes": round(path.stat().st_size / 1e6, 2),
    }


def training_clips(path: Path) -> TrainingClips:
    recipe = vit_b_16()
    manifest = Manifest("clips", "", (str(path.absolute()),), (0,), ("class",))
    return TrainingClips(manifest, recipe.sampling, 224, recipe.augmentation, 0, Cache())


def resized(path: Path, to: Path, short_side: int, keys_every_s: float) -> Path:
    """A copy of the picture in another size."""
    with av.open(str(path)) as given, av.open(str(to), "w") as made:
        source = given.streams.video[0]
        rate = source.average_rate or source.guessed_rate
        stream = made.add_stream("libx264", rate=rate, options={"crf": "20", "preset": "medium"})
        height, width = scaled(source.height, source.width, short_side)
        stream.width, stream.height, stream.pix_fmt = width // 2 * 2, height // 2 * 2, "yuv420p"
        stream.codec_context.gop_size = round(keys_every_s * float(rate or 30))
        for i, frame in enumerate(given.decode(source)):
            picture = frame.reformat(stream.width, stream.height, "yuv420p")
            picture.pts, picture.time_base = i, 1 / rate
            picture.pict_type = av.video.frame.PictureType.NONE
            made.mux(stream.encode(picture))
        made.mux(stream.encode())
    return to


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
