"""How much memory training takes on a device: counted operation by operation, with nothing computed or allocated."""

from __future__ import annotations

import copy
import weakref
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from applications.openvclip.model.clip import CLIP
from applications.openvclip.model.precision import Name, Precision
from applications.openvclip.model.video_encoder import VideoEncoder
from interpolate import InterpolatedWeightRegularizer, SWAAverager

M = TypeVar("M", bound=nn.Module)

FITTED = 4, 8
"""Clips at once that the line goes through: with fewer, the peak may be at another moment of the step."""
CLASSES = 400
"""Of Kinetics; their embeddings weigh little."""


@dataclass(frozen=True)
class Memory:
    """Bytes that a device holds at the peak of a step, as a line over the clips that go through the model together."""

    sharded: int
    """What FSDP2 divides among devices: the weights that are trained, their gradients, AdamW's two moments, the anchor,
    the interpolated weights, and the average in float64."""
    fixed: int
    """What else does not depend on the clips, such as the text tower."""
    per_clip: int
    """Activations kept for the backward pass, and what comes and goes meanwhile."""

    def at(self, clips: int, *, shards: int = 1) -> int:
        """Bytes with so many clips at once, without the few blocks that FSDP2 gathers at a time.

        What the device's own libraries take is not in it: about half a gigabyte on a GPU, and what fragments.
        """
        return self.sharded // shards + self.fixed + clips * self.per_clip

    def clips_within(self, budget: float, *, shards: int = 1) -> int:
        """The most clips at once that a number of bytes has room for; 0 if there is none for a single one."""
        return max(0, int((budget - self.at(0, shards=shards)) // self.per_clip))


def memory_of(clip: CLIP, **settings: Any) -> Memory:
    """The memory of training a CLIP's image tower; `settings` are those of `peak_of_step`."""
    few, more = (peak_of_step(clip, clips, **settings) for clips in FITTED)
    per_clip = (more - few) // (FITTED[1] - FITTED[0])
    sharded = 8 * sum(p.nbytes for p in VideoEncoder(clip).parameters())
    return Memory(sharded, few - FITTED[0] * per_clip - sharded, per_clip)


def peak_of_step(
    clip: CLIP,
    clips: int,
    *,
    frames: int,
    precision: Name = "fp32",
    activation_checkpointing: bool = False,
    replicated: bool = False,
) -> int:
    """The most bytes that are alive at once in a step of interpolated weight optimization with AdamW and averages.

    Args:
        clip: The CLIP whose image tower is trained; it is only looked at.
        clips: How many go through the model together.
        frames: Of a clip.
        precision: In which numbers the passes are computed.
        activation_checkpointing: Whether blocks are computed again in the backward pass.
        replicated: Whether DDP keeps its buckets, a second copy of the gradients.
    """
    device = clip.logit_scale.device
    with FakeTensorMode(), Allocations(device.type) as allocations:
        whole = of_the_same_shapes(clip)
        model = VideoEncoder(whole, activation_checkpointing=activation_checkpointing).train()
        regularizer, averager = InterpolatedWeightRegularizer(model), SWAAverager(model)
        for _ in range(2):
            averager.update()
        held = [torch.empty_like(p) for p in model.parameters() for _ in range(3 if replicated else 2)]
        for p in model.parameters():
            p.grad = torch.empty_like(p)  # of the micro-batch before; held are the two moments, and buckets
        size: Any = model.visual.image_size
        projection: Any = whole.text_projection
        video = torch.empty(clips, 3, frames, *size, device=device)
        class_embeddings = torch.empty(CLASSES, projection.shape[1], device=device)
        labels = torch.zeros(clips, dtype=torch.long, device=device)
        numbers = Precision(precision, device)

        def loss_of(model: nn.Module) -> Tensor:
            with numbers.autocast():
                return F.cross_entropy(model(video, class_embeddings), labels)

        regularizer.backward(loss_of)
        del held
    return allocations.peak


def of_the_same_shapes(module: M) -> M:
    """A copy whose tensors are made anew, without values where the mode of the moment makes such."""
    tensors = {
        id(t): torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in [*module.parameters(), *module.buffers()]
    }
    parameters = {id(p): nn.Parameter(tensors[id(p)], p.requires_grad) for p in module.parameters()}
    return copy.deepcopy(module, tensors | parameters)


class Allocations(TorchDispatchMode):
    """Counts the bytes of all storages that operations make on a kind of device, until they are freed."""

    def __init__(self, device_type: str) -> None:
        super().__init__()
        self.device_type = device_type
        self.alive = 0
        self.peak = 0
        self._seen: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.device.type == self.device_type:
                self._note(tensor.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        if storage in self._seen:
            return
        self._seen.add(storage)
        size = storage.nbytes()
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.alive -= size
