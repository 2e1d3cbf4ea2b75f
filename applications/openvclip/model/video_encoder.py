"""A video CLIP: the image tower of a CLIP, its attention expanded over neighbouring frames."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from applications.openvclip.model.clip import CLIP, ImageTower
from applications.openvclip.model.temporal_attention import Edge, temporal_attention

if TYPE_CHECKING:
    from open_clip.transformer import VisionTransformer

M = TypeVar("M", bound=nn.Module)


class VideoEncoder(nn.Module):
    """Scores clips against class embeddings with the weights of a CLIP.

    The parameters are the CLIP's own, not copies, under the names they have in open_clip (`visual.…`, `logit_scale`):
    a checkpoint of one loads into the other. The modules that hold them are the CLIP's too; the blocks around them are
    not, so that the CLIP's own image tower stays what it is, and several encoders can share a CLIP.

    Source: Weng et al. 2023 (arXiv 2302.00624), eq. 2-3.

    Args:
        clip: One whose image tower is a vision transformer of plain attention blocks.
        temporal: Whether tokens see the neighbouring frames. False is CLIP*, the image model on each frame.
        edge: What the first and last frame see beyond the clip (`temporal_attention`); published weights need "zero".
        activation_checkpointing: Whether training keeps a block's input only, and computes the rest again in backward.

    Raises:
        TypeError: The image tower is of a kind whose attention can't be expanded.
        ValueError: `edge` is neither "mask" nor "zero".
    """

    def __init__(
        self, clip: CLIP, *, temporal: bool = True, edge: Edge = "mask", activation_checkpointing: bool = False
    ) -> None:
        super().__init__()
        if edge not in ("mask", "zero"):
            raise ValueError(f"edge must be 'mask' or 'zero', got {edge!r}.")
        tower = extendable(clip.visual)
        blocks = nn.ModuleList(VideoBlock(block) for block in tower.transformer.resblocks)
        self.visual = _twin(tower, transformer=_twin(tower.transformer, resblocks=blocks))
        self.logit_scale = clip.logit_scale
        self.temporal = temporal
        self.edge: Edge = edge
        self.activation_checkpointing = activation_checkpointing

    def encode(self, video: Tensor) -> Tensor:
        """The features of each frame, before normalisation: (B, 3, T, H, W) → (B, T, E)."""
        if video.ndim != 5 or video.shape[1] != 3:
            raise ValueError(f"video must be (B, 3, T, H, W), got {tuple(video.shape)}.")
        if tuple(video.shape[-2:]) != tuple(self.visual.image_size):
            raise ValueError(f"frames must be {tuple(self.visual.image_size)} pixels, got {tuple(video.shape[-2:])}.")
        frames = video.shape[2]
        x = self.visual._embeds(rearrange(video, "b c t h w -> (b t) c h w"))
        seen_together, edge = (frames, self.edge) if self.temporal else (1, "mask")
        for block in self.visual.transformer.resblocks:
            if self.activation_checkpointing and self.training:
                x = checkpoint(block, x, seen_together, edge, use_reentrant=False)
            else:
                x = block(x, seen_together, edge)
        pooled, _ = self.visual._pool(x)
        features = pooled if self.visual.proj is None else pooled @ self.visual.proj
        return rearrange(features, "(b t) e -> b t e", t=frames)

    def forward(self, video: Tensor, class_embeddings: Tensor) -> Tensor:
        """Logits of each class: the mean over frames of the scaled cosine similarity.

        Args:
            video: (B, 3, T, H, W), normalised as the CLIP expects.
            class_embeddings: (K, E), of unit length.

        Returns:
            (B, K). Linear in the similarities, so views add up and a subset of classes is a selection of columns.
        """
        return self.logits(self.embed(video), class_embeddings)

    def embed(self, video: Tensor) -> Tensor:
        """The mean of the unit embeddings of a clip's frames: (B, 3, T, H, W) → (B, E), no longer of unit length."""
        features = self.encode(video)
        features = features.to(torch.promote_types(features.dtype, torch.float32))  # from autocast's
        return F.normalize(features, dim=-1).mean(dim=1)

    def logits(self, embeddings: Tensor, class_embeddings: Tensor) -> Tensor:
        """Embeddings of clips (B, E) and of classes (K, E) → (B, K), in their precision under autocast too."""
        scale: Any = self.logit_scale
        scale = scale.to_local() if hasattr(scale, "device_mesh") else scale  # a DTensor; its import takes a second
        with torch.autocast(embeddings.device.type, enabled=False):
            return scale.exp() * embeddings @ class_embeddings.T.to(embeddings.dtype)


class VideoBlock(nn.Module):
    """A `ResidualAttentionBlock` with attention over neighbouring frames: the same modules, under the same names.

    What gathers its weights when it is called, as FSDP2 does, is set on this block.
    """

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.ln_1, self.attn, self.ls_1 = block.ln_1, block.attn, block.ls_1
        self.ln_2, self.mlp, self.ls_2 = block.ln_2, block.mlp, block.ls_2

    def forward(self, x: Tensor, frames: int, edge: Edge) -> Tensor:
        """Tokens (B * frames, N, D) → the same shape."""
        x = x + self.ls_1(temporal_attention(self.attn, self.ln_1(x), frames=frames, edge=edge))
        return x + self.ls_2(self.mlp(self.ln_2(x)))


def _twin(module: M, **children: nn.Module) -> M:
    """A second module with the same parameters, in one and the same dictionary, and the same children but for those."""
    twin = copy.copy(module)
    twin._modules = {**module._modules, **children}
    return twin


def extendable(tower: nn.Module) -> ImageTower | VisionTransformer:
    """The tower itself, if it is a vision transformer whose blocks use a plain `nn.MultiheadAttention`."""
    if isinstance(tower, ImageTower):
        return tower
    from open_clip.transformer import (  # takes seconds, unless it is one of its
        ResidualAttentionBlock,
        VisionTransformer,
    )

    if not isinstance(tower, VisionTransformer):
        raise TypeError(
            f"the image tower is a {type(tower).__module__}.{type(tower).__name__}; temporal attention can be added to "
            "open_clip's VisionTransformer only (ViT-B-32, ViT-B-16, ViT-L-14, …, not ResNet, timm or ConvNeXt towers)."
        )
    for i, block in enumerate(tower.transformer.resblocks):
        attention = getattr(block, "attn", None)
        plain = (
            type(block) is ResidualAttentionBlock
            and isinstance(attention, nn.MultiheadAttention)
            and attention.in_proj_weight is not None
            and attention.bias_k is None
            and not attention.add_zero_attn
        )
        if not plain:
            raise TypeError(
                f"block {i} of the image tower is a {type(block).__name__} with {type(attention).__name__}; "
                "temporal attention can be added to ResidualAttentionBlock with a plain nn.MultiheadAttention only."
            )
    if tower.pool_type == "none":
        raise TypeError("the image tower pools nothing (pool_type='none'); one feature vector per frame is needed.")
    return tower
