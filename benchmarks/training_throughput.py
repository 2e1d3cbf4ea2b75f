"""What does the trainer cost? Against a bare loop over ready tensors, and how long it waits for videos.

The bare loop takes the same steps: interpolated weight regularization on the same micro-batches, clipping, AdamW and
the average, and nothing else. The trainer does them with its journal, progress and curves. First both have clips that
lie ready in memory, in turns within one training; then the trainer has clips of 224 pixels that two processes decode.

python benchmarks/training_throughput.py --videos /data/k400/val
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path

if __name__ != "__mp_main__":  # the processes that read videos import this script again, and need none of these
    import measuring
    import torch
    import tyro
    from open_clip import CLIPTextCfg, CLIPVisionCfg
    from open_clip.model import CLIP
    from torch import nn
    from torch.nn.functional import cross_entropy, normalize

    from applications.openvclip.data.augmentation import Augmentation
    from applications.openvclip.data.loader import MicroBatch, TrainingOrder, micro_batches
    from applications.openvclip.data.manifest import Manifest
    from applications.openvclip.data.sampling import Sampling
    from applications.openvclip.data.storage import Cache
    from applications.openvclip.data.training_clips import TrainingClips
    from applications.openvclip.data.transforms import Normalisation
    from applications.openvclip.model.precision import Precision
    from applications.openvclip.model.video_encoder import VideoEncoder
    from applications.openvclip.runs.folder import RunFolder
    from applications.openvclip.runs.journal import Journal, read_journal
    from applications.openvclip.training.checkpoints import Checkpoints
    from applications.openvclip.training.interruption import Interruption
    from applications.openvclip.training.monitor import Monitor
    from applications.openvclip.training.optimisation import LearningRate, adamw
    from applications.openvclip.training.step import Step
    from applications.openvclip.training.trainer import Saving, Trainer
    from applications.openvclip.training.watch import Watch
    from applications.openvclip.training_run import on_device
    from interpolate import InterpolatedWeightRegularizer, SWAAverager

FRAMES, CLASSES = 8, 10
BATCH, MICRO_BATCH = 8, 4


def main(videos: Path | None = None, runs: int = 9, steps: int = 5, workers: int = 2, layers: int = 2) -> None:
    """Measure both, and write results/training_throughput.json.

    Args:
        videos: Folder of videos to train on; by default one as large as a clip of Kinetics is made.
        runs: Times that trainer and bare loop take their turns; a first time is not counted.
        steps: Steps of a turn.
        workers: Processes that decode.
        layers: Of the image tower, of width 192 and patches of 32: with 2 a step on a processor is about as fast as
            one of ViT-B/32 on a GPU.
    """
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ready = {f"{size} pixels": against_bare(folder / str(size), size, layers, runs, steps) for size in (32, 224)}
        found = (
            [path for path in sorted(videos.rglob("*")) if path.suffix in (".mp4", ".mkv", ".avi", ".webm")]
            if videos
            else [made(folder)]
        )
        decoding = waiting(folder / "decoding", found, layers, runs * steps, workers)
    measuring.save(
        "training_throughput",
        {
            "question": "time of the bare loop over the trainer's, and share of time waiting for videos",
            "batch": BATCH,
            "micro_batch": MICRO_BATCH,
            "frames": FRAMES,
            "layers": layers,
            "runs": runs,
            "steps_of_a_run": steps,
            "bare loop over trainer, ready clips": ready,
            "decoded clips": decoding,
        },
    )


def against_bare(folder: Path, size: int, layers: int, runs: int, steps: int) -> dict[str, object]:
    """Both in turns: the trainer asks for its next clips, and before it gets them the bare loop takes its steps."""
    total = (runs + 2) * steps
    trainer, bare = small_trainer(folder, size, layers, total), small_trainer(folder / "bare", size, layers, total).step
    generator = torch.Generator().manual_seed(0)
    clips = torch.randn(BATCH // MICRO_BATCH, MICRO_BATCH, 3, FRAMES, size, size, generator=generator)
    ready = [MicroBatch(clip, torch.arange(MICRO_BATCH) % CLASSES, ("",) * MICRO_BATCH) for clip in clips]
    seconds: dict[str, list[float]] = {"trainer": [], "bare loop": []}

    def in_turns() -> Iterator[MicroBatch]:
        while True:
            start = time.perf_counter()
            for _ in range(steps):
                yield from ready
            middle = time.perf_counter()  # the trainer has ended its last step, and asks for the next
            for _ in range(steps):
                bare_step(bare, ready)
            seconds["trainer"].append(middle - start)
            seconds["bare loop"].append(time.perf_counter() - middle)

    fit(trainer, in_turns())
    turns = {name: values[1 : runs + 1] for name, values in seconds.items()}  # nobody asks after the last one
    speed = BATCH * steps / statistics.median(turns["trainer"])
    return {"ratio": measuring.ratios(turns, "trainer")["bare loop"], "clips_per_s": round(speed, 2)}


def bare_step(step: Step, batches: list[MicroBatch]) -> None:
    """What one would write without a trainer."""
    for group in step.optimizer.param_groups:
        group["lr"] = step.learning_rate(step.taken)
    step.optimizer.zero_grad()
    with step.regularizer.one_step():
        for m, batch in enumerate(batches):
            step.regularizer.backward(
                lambda model, batch=batch: (
                    cross_entropy(model(batch.clips, step.class_embeddings), batch.labels) / len(batches)
                ),
                index=m,
            )
    nn.utils.clip_grad_norm_(step.encoder.parameters(), step.max_gradient_norm)
    step.optimizer.step()
    step.averager.update()


def waiting(folder: Path, videos: list[Path], layers: int, steps: int, workers: int) -> dict[str, object]:
    """The trainer on clips that are decoded, and the decoding alone."""
    trainer = small_trainer(folder, 224, layers, steps)
    rows = [path for _, path in zip(range(8 * BATCH), cycle(videos), strict=False)]
    manifest = Manifest(
        "videos",
        str(videos[0].parent),
        tuple(str(path.resolve()) for path in rows),
        tuple(i % CLASSES for i in range(len(rows))),
        tuple(f"class {i}" for i in range(CLASSES)),
    )
    clips = TrainingClips(manifest, Sampling(frames=FRAMES), 224, Augmentation(), 0, Cache())

    def decoded() -> Iterator[MicroBatch]:
        return micro_batches(clips, trainer.step.order, workers=workers, time_limit_s=60.0)

    fit(trainer, on_device(decoded(), Normalisation((0.5,) * 3, (0.25,) * 3)))
    of_steps = [event["machine"] for event in read_journal(folder / "journal.jsonl") if event["event"] == "step"][5:]
    took = sum(1 / machine["clips_per_s"] for machine in of_steps)
    waited = sum(machine["waiting"] / machine["clips_per_s"] for machine in of_steps)
    alone = decoded()
    next(alone)
    start = time.perf_counter()
    n = sum(len(batch.labels) for batch, _ in zip(alone, range(5 * BATCH // MICRO_BATCH), strict=False))
    return {
        "videos": [path.name for path in videos],
        "workers": workers,
        "steps": len(of_steps),
        "waiting": round(waited / took, 3),
        "clips_per_s": round(len(of_steps) / took, 2),
        "decoded_clips_per_s, nothing else": round(n / (time.perf_counter() - start), 2),
    }


def small_trainer(folder: Path, size: int, layers: int, steps: int) -> Trainer:
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    vision = CLIPVisionCfg(layers=layers, width=192, head_width=64, patch_size=32 if size > 32 else 8, image_size=size)
    clip = CLIP(embed_dim=128, vision_cfg=vision, text_cfg=CLIPTextCfg(width=64, heads=1, layers=1))
    encoder = VideoEncoder(clip)
    device = torch.device("cpu")
    step = Step(
        encoder,
        encoder,
        class_embeddings=normalize(torch.randn(CLASSES, 128), dim=-1),
        optimizer=adamw(encoder, weight_decay=0.01, betas=(0.9, 0.98)),
        learning_rate=LearningRate(1e-5, 0.0, warmup_steps=0, total_steps=steps, schedule="constant"),
        regularizer=InterpolatedWeightRegularizer(encoder, seed=0),
        averager=SWAAverager(encoder, cycle_steps=10),
        max_gradient_norm=1.0,
        order=TrainingOrder(8 * BATCH, BATCH, MICRO_BATCH, seed=0, first_step=0, last_step=steps),
        alpha_per="micro-batch",
        clips_at_once=MICRO_BATCH,
        precision=Precision("fp32", device),
    )
    return Trainer(
        step,
        checkpoints=Checkpoints(folder / "checkpoints", keep=1),
        saving=Saving(every_steps=None, every_minutes=10.0),
        watch=Watch(600.0),
        monitor=Monitor(Journal(folder / "journal.jsonl"), RunFolder(folder), steps, BATCH, tensorboard=False),
        identity={},
    )


def fit(trainer: Trainer, batches: Iterator[MicroBatch]) -> None:
    assert trainer.monitor is not None
    with Interruption() as interruption, trainer.monitor:
        trainer.fit(batches, interruption)


def made(folder: Path) -> Path:
    from decoding import textures

    return textures(folder / "textures.mp4")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
