"""How much memory does a step of training take, at how many clips at once, in which precision?

Bytes saved for backward are told by `torch.autograd.graph.saved_tensors_hooks`: storages, each once, parameters left
out. The peak of a step is counted from what its operations allocate (`applications.openvclip.training.memory`), with
the gradients of the micro-batch before, AdamW's moments, anchor, interpolated weights, average, and DDP's buckets.
Both are counted on tensors without memory, with two and with three blocks, which are all alike, and continued to as
many as the model has. Then real steps are taken in processes of their own, and the peak of
resident memory stands beside what was counted.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import astuple
from typing import Any, TypeVar

import open_clip
import torch
from iwr_memory import kilobytes
from measuring import alone, save
from open_clip.model import CLIP
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from applications.openvclip.model.precision import Name, Precision
from applications.openvclip.model.video_encoder import VideoEncoder
from applications.openvclip.training.memory import Memory, memory_of, of_the_same_shapes, peak_of_step
from interpolate import InterpolatedWeightRegularizer, SWAAverager

F = torch.nn.functional
FRAMES = 8
MODELS = ("ViT-B-32-quickgelu", "ViT-B-16-quickgelu", "ViT-L-14-quickgelu")
PRECISIONS: tuple[Name, ...] = ("fp32", "bf16")
CARDS = (24, 40, 80)
ROOM = 0.9
"""The share of a card that is counted on: CUDA's own needs and fragments of freed memory take the rest."""
REAL = ("ViT-B-32-quickgelu", 2)
T = TypeVar("T")


def build(name: str) -> CLIP:
    return CLIP(**(open_clip.get_model_config(name) or {}))


def shapes(name: str, layers: int) -> CLIP:
    config = open_clip.get_model_config(name) or {}
    with FakeTensorMode():
        return CLIP(**{**config, "vision_cfg": {**config["vision_cfg"], "layers": layers}})


def continued(name: str, count: Callable[[CLIP], T]) -> tuple[T, T, int]:
    """What is counted with two blocks, with three, and how many follow on the third."""
    layers = (open_clip.get_model_config(name) or {})["vision_cfg"]["layers"]
    return count(shapes(name, 2)), count(shapes(name, 3)), layers - 3


def line(two: float, three: float, more: int) -> float:
    return three + more * (three - two)


def saved_bytes(whole: CLIP, clips: int, precision: Name, activation_checkpointing: bool) -> int:
    with FakeTensorMode():
        whole = of_the_same_shapes(whole)
        encoder = VideoEncoder(whole, activation_checkpointing=activation_checkpointing).train()
        own = {p.untyped_storage()._cdata for p in encoder.parameters()}
        saved: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                saved[storage._cdata] = storage.nbytes()
            return tensor

        video = torch.empty(clips, 3, FRAMES, *encoder.visual.image_size)
        class_embeddings = torch.empty(400, whole.text_projection.shape[1])
        with saved_tensors_hooks(pack, lambda tensor: tensor), Precision(precision, torch.device("cpu")).autocast():
            loss = encoder(video, class_embeddings).sum()
        total = sum(saved.values())
        del loss
    return total


def resident(name: str, clips: str) -> float:
    """Bytes that steps in float32 add to the resident memory of this process, the model included."""
    torch.set_num_threads(1)
    gc.collect()
    before = kilobytes("VmRSS")
    whole = build(name)
    model = VideoEncoder(whole).train()
    regularizer, averager = InterpolatedWeightRegularizer(model), SWAAverager(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, foreach=False)
    video = torch.randn(int(clips), 3, FRAMES, *model.visual.image_size)
    class_embeddings = torch.randn(400, whole.text_projection.shape[1])
    labels = torch.zeros(int(clips), dtype=torch.long)
    for step in range(2):
        for _ in range(2):  # micro-batches: the gradients of the first are there when the second begins
            regularizer.backward(lambda model: F.cross_entropy(model(video, class_embeddings), labels))
        optimizer.step()
        averager.update()
        if step == 0:
            optimizer.zero_grad()
    return (kilobytes("VmHWM") - before) * 1024


def gigabytes(size: float) -> float:
    return round(size / 1e9, 3)


def described(name: str, precision: Name, activation_checkpointing: bool) -> dict[str, object]:
    two, three, more = continued(
        name,
        lambda clip: memory_of(
            clip,
            frames=FRAMES,
            precision=precision,
            activation_checkpointing=activation_checkpointing,
            replicated=True,
        ),
    )
    counted = Memory(*(round(line(a, b, more)) for a, b in zip(astuple(two), astuple(three), strict=True)))
    saved = {
        clips: line(*continued(name, lambda clip, n=clips: saved_bytes(clip, n, precision, activation_checkpointing)))
        for clips in (1, 2, 4)
    }
    found = {
        "saved_for_backward_gb": {clips: gigabytes(size) for clips, size in saved.items()},
        "peak_gb": {clips: gigabytes(counted.at(clips)) for clips in (1, 2, 4, 8)},
        "divided_by_fsdp2_gb": gigabytes(counted.sharded),
        "fixed_gb": gigabytes(counted.fixed),
        "per_clip_gb": gigabytes(counted.per_clip),
        "most_clips_at_once": {f"{card} GB": counted.clips_within(ROOM * card * 1e9) for card in CARDS},
    }
    print(name, precision, activation_checkpointing, found, flush=True)
    return found


def main() -> None:
    record: dict[str, Any] = {"frames": FRAMES, "room_on_a_card": ROOM}
    record["models"] = {
        name: {
            f"{precision}{', activation checkpointing' if checkpointing else ''}": described(
                name, precision, checkpointing
            )
            for precision in PRECISIONS
            for checkpointing in (False, True)
        }
        for name in MODELS
    }
    save("training_memory", record)
    name, clips = REAL
    two, three, more = continued(name, lambda clip: peak_of_step(clip, clips, frames=FRAMES))
    record["real_steps_in_fp32"] = {
        "model": name,
        "clips_at_once": clips,
        "counted_gb": gigabytes(line(two, three, more)),
        "resident_gb": gigabytes(alone("training_memory", "resident", name, str(clips))),
    }
    save("training_memory", record)


if __name__ == "__main__":
    main()
