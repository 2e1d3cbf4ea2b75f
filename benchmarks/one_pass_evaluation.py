"""Is one pass over the videos worth it? 14 protocol parts at 5 anchor weights, in one pass and one by one.

python benchmarks/one_pass_evaluation.py
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

if __name__ != "__mp_main__":  # the processes that read videos import this script again, and need none of these
    import av
    import measuring
    import numpy as np
    import torch
    import tyro

    from applications.openvclip.data.manifest import Manifest
    from applications.openvclip.data.sampling import Sampling
    from applications.openvclip.data.storage import Cache
    from applications.openvclip.data.transforms import Normalisation
    from applications.openvclip.miniature import glyphs, tiny_clip
    from applications.openvclip.model.classifier import class_embeddings
    from applications.openvclip.model.precision import Precision
    from applications.openvclip.model.prompts import OBJECT_TEMPLATES
    from applications.openvclip.model.video_encoder import VideoEncoder
    from applications.openvclip.zeroshot.one_pass import Reading, Scorer, at_weights, look
    from applications.openvclip.zeroshot.passes import plan
    from applications.openvclip.zeroshot.protocols import Protocol, halves
    from applications.openvclip.zeroshot.scores import results_of
    from interpolate import patch
    from interpolate.weights import trainable_weights

ANCHOR_WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Measured:
    """One way of evaluating, in one run."""

    seconds: float
    videos_decoded: int
    accuracies: dict[str, list[float]]


def main(classes: int = 67, videos_per_class: int = 3, runs: int = 3, workers: int = 1) -> None:
    """Measure both ways, alternately, and write results/one_pass_evaluation.json.

    Args:
        classes: Classes of the set.
        videos_per_class: Videos of each, a multiple of 3.
        runs: Times that both ways are measured, minutes each; a first time in one pass is not counted.
        workers: Processes that decode.
    """
    torch.set_num_threads(1)
    source = tiny_clip.load_pretrained(torch.device("cpu"))
    reading = Reading(source.image_size, Normalisation(source.image_mean, source.image_std), workers, 60.0, 8, Cache())
    precision = Precision("fp32", torch.device("cpu"))
    model = VideoEncoder(source.clip).eval()
    anchor = {name: p.detach() for name, p in trainable_weights(model).items()}
    theta = {name: p + 0.02 * torch.randn_like(p) for name, p in anchor.items()}
    scorers = {f"{w:g}": at_weights(model, patch(anchor, theta, anchor_weight=w)) for w in ANCHOR_WEIGHTS}

    def measure(protocols: list[Protocol], scorers: Mapping[str, Scorer]) -> Measured:
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            decoded, accuracies = 0, {}
            for one, group in plan(protocols).items():
                embeddings = class_embeddings(source.clip, source.tokenizer, one.classes, one.templates)
                files = look(one, scorers, embeddings, reading, Path(folder), precision=precision, weights="")
                decoded += len(one.videos)
                for result in results_of(group, one, files):
                    for scorer, accuracy in result.accuracy.items():
                        accuracies[f"{result.protocol} {scorer}"] = accuracy["top-1"]
            return Measured(time.perf_counter() - start, decoded, accuracies)

    with tempfile.TemporaryDirectory() as folder:
        whole = write_videos(Path(folder), classes, videos_per_class)
        protocols = protocols_of(whole)
        parts = [
            replace(protocol, name=f"{protocol.name} {i}", parts=(part,))
            for protocol in protocols
            for i, part in enumerate(protocol.parts)
        ]
        together, apart = [], []
        measure(protocols, scorers)
        for _ in range(runs):
            together.append(measure(protocols, scorers))
            singly = [measure([part], {name: scorer}) for part in parts for name, scorer in scorers.items()]
            accuracies = {name: value for single in singly for name, value in single.accuracies.items()}
            seconds, videos = sum(s.seconds for s in singly), sum(s.videos_decoded for s in singly)
            apart.append(Measured(seconds, videos, accuracies))
    one_by_one = apart[0].accuracies
    same = all(
        value == one_by_one[f"{name} {i} {scorer}"][0]
        for key, values in together[0].accuracies.items()
        for name, scorer in [key.rsplit(" ", 1)]
        for i, value in enumerate(values)
    )
    result = {
        "question": "one pass over the videos against one by one",
        "parts": len(parts),
        "anchor_weights": ANCHOR_WEIGHTS,
        "videos": len(whole),
        "video": "MPEG-4 in AVI, 320 x 240 pixels, 180 frames",
        "views": protocols[0].sampling.views,
        "runs": runs,
        "accuracies_are_equal": same,
        "one pass": summary(together),
        "one by one": summary(apart),
        "ratio of seconds, median": statistics.median(
            b.seconds / a.seconds for a, b in zip(together, apart, strict=True)
        ),
    }
    measuring.save("one_pass_evaluation", result)


def summary(runs: list[Measured]) -> dict[str, object]:
    seconds = sorted(run.seconds for run in runs)
    return {
        "videos decoded": runs[0].videos_decoded,
        "seconds, median": round(statistics.median(seconds), 3),
        "seconds, from and to": [round(seconds[0], 3), round(seconds[-1], 3)],
    }


def protocols_of(whole: Manifest) -> list[Protocol]:
    """Like EP1 (10 halves), EP2 and EP3 (3 splits)."""
    splits = tuple(whole.only(range(i, len(whole), 3)) for i in range(3))
    common = {"templates": OBJECT_TEMPLATES, "sampling": Sampling()}
    return [
        Protocol("EP1", halves(whole, seed=0), **common),
        Protocol("EP2", (whole,), **common),
        Protocol("EP3", splits, **common),
    ]


def write_videos(folder: Path, classes: int, videos_per_class: int) -> Manifest:
    """Moving textures, in videos as those of UCF-101 are: MPEG-4 in AVI, 320 x 240, 180 frames, a keyframe in 12."""
    names = glyphs.names()[:classes]
    rng = np.random.default_rng(0)
    paths = [f"{i}.avi" for i in range(classes * videos_per_class)]
    for path in paths:
        texture = rng.integers(0, 255, (30, 40, 3), dtype=np.uint8).repeat(8, axis=0).repeat(8, axis=1)
        with av.open(str(folder / path), "w") as container:
            stream = container.add_stream("mpeg4", rate=25)
            stream.height, stream.width, stream.pix_fmt, stream.gop_size = 240, 320, "yuv420p", 12
            for i in range(180):
                frame = av.VideoFrame.from_ndarray(np.roll(texture, 2 * i, axis=1), format="rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
    labels = tuple(i % classes for i in range(len(paths)))
    return Manifest("benchmark", str(folder), tuple(paths), labels, tuple(names))


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
