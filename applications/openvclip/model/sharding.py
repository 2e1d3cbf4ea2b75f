"""Weights of an encoder shared out among processes by FSDP2."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, distribute_tensor

from applications.openvclip.model.video_encoder import VideoEncoder


def shard(encoder: VideoEncoder, mesh: DeviceMesh, **options: Any) -> VideoEncoder:
    """Share out the encoder's weights in place, block by block; names, shapes and what it computes stay.

    FSDP2 takes no scalars, such as CLIP's `logit_scale`: they become DTensors that every process has whole, and their
    gradients are averaged as FSDP2 averages the others'. So every parameter is a DTensor, and optimizers and the
    clipping of gradients find no mixture. The CLIP around the encoder can't be called while its weights are shared out.

    Args:
        encoder: On the mesh's kind of device.
        mesh: The processes.
        options: As for `torch.distributed.fsdp.fully_shard`.

    Returns:
        The encoder.
    """
    for block in encoder.visual.transformer.resblocks:
        fully_shard(block, mesh=mesh, **options)
    scalars = {name: p for name, p in encoder.named_parameters() if not p.ndim}
    fully_shard(encoder, mesh=mesh, ignored_params=set(scalars.values()), **options)
    for name, p in scalars.items():
        path, _, own = name.rpartition(".")
        replicated = nn.Parameter(
            distribute_tensor(p.detach(), mesh, [Replicate()] * mesh.ndim), requires_grad=p.requires_grad
        )
        if p.requires_grad:
            replicated.register_hook(_mean)
        setattr(encoder.get_submodule(path), own, replicated)
    return encoder


def _mean(gradient: DTensor) -> DTensor:
    """The mean over processes of what they have computed each on its own part of the batch."""
    mesh = gradient.device_mesh
    total = DTensor.from_local(gradient.to_local(), mesh, [Partial()] * mesh.ndim)
    return total.redistribute(placements=[Replicate()] * mesh.ndim) / mesh.size()  # pyright: ignore[reportReturnType]
