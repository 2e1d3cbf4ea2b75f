"""A video CLIP: the image tower of a CLIP, its attention expanded over neighbouring frames."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from einops import rearrange
from open_clip.model import CLIP
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from applications.openvclip.model.temporal_attention import Edge, temporal_attention


class VideoEncoder(nn.Module):
    """Scores clips against class embeddings with the weights of a CLIP.

    The parameters are the CLIP's own, not copies, under the names they have in open_clip (`visual.…`, `logit_scale`):
    a checkpoint of one loads into the other.

    Source: Weng et al. 2023 (arXiv 2302.00624), eq. 2-3.

    Args:
        clip: An open_clip model whose image tower is a `VisionTransformer` of plain attention blocks.
        temporal: Whether tokens see the neighbouring frames. False is CLIP*, the image model on each frame.
        edge: What the first and last frame see beyond the clip (`temporal_attention`); published weights need "zero".

    Raises:
        TypeError: The image tower is of a kind whose attention can't be expanded.
        ValueError: `edge` is neither "mask" nor "zero".
    """

    def __init__(self, clip: CLIP, *, temporal: bool = True, edge: Edge = "mask") -> None:
        super().__init__()
        if edge not in ("mask", "zero"):
            raise ValueError(f"edge must be 'mask' or 'zero', got {edge!r}.")
        self.visual = extendable(clip.visual)
        self.logit_scale = clip.logit_scale
        self.temporal = temporal
        self.edge: Edge = edge

    def encode(self, video: Tensor) -> Tensor:
        """The features of each frame, before normalisation: (B, 3, T, H, W) → (B, T, E)."""
        if video.ndim != 5 or video.shape[1] != 3:
            raise ValueError(f"video must be (B, 3, T, H, W), got {tuple(video.shape)}.")
        if tuple(video.shape[-2:]) != tuple(self.visual.image_size):
            raise ValueError(f"frames must be {tuple(self.visual.image_size)} pixels, got {tuple(video.shape[-2:])}.")
        frames = video.shape[2]
        x = self.visual._embeds(rearrange(video, "b c t h w -> (b t) c h w"))
        for block in self.visual.transformer.resblocks:
            if self.visual.transformer.grad_checkpointing and self.training:
                x = checkpoint(self._block, block, x, frames, use_reentrant=False)
            else:
                x = self._block(block, x, frames)
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
        return F.normalize(self.encode(video), dim=-1).mean(dim=1)

    def logits(self, embeddings: Tensor, class_embeddings: Tensor) -> Tensor:
        """Embeddings of clips (B, E) and of classes (K, E) → (B, K)."""
        return self.logit_scale.exp() * embeddings @ class_embeddings.T

    def _block(self, block: Any, x: Tensor, frames: int) -> Tensor:
        seen_together = frames if self.temporal else 1
        edge = self.edge if self.temporal else "mask"
        x = x + block.ls_1(temporal_attention(block.attn, block.ln_1(x), frames=seen_together, edge=edge))
        return x + block.ls_2(block.mlp(block.ln_2(x)))


def extendable(tower: nn.Module) -> VisionTransformer:
    """The tower itself, if it is a `VisionTransformer` whose blocks use a plain `nn.MultiheadAttention`."""
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
