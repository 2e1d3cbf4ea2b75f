"""Self-attention over a frame and its neighbours, with the weights of an image tower's attention."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

Edge = Literal["mask", "zero"]


def temporal_attention(attention: nn.MultiheadAttention, x: Tensor, *, frames: int, edge: Edge) -> Tensor:
    """Self-attention in which the tokens of frame t see the keys and values of frames t - 1, t and t + 1.

    No parameter is added. With `frames=1` and `edge="mask"` this is the plain attention of each frame. The keys
    and values of all frames lie one after another: a frame's neighbourhood is a slice of them, and nothing is copied.

    Source: Weng et al. 2023 (arXiv 2302.00624), eq. 3. The paper does not say what the first and the last frame see.

    Args:
        attention: The image tower's attention, of width D.
        x: Normalised tokens, (B * frames, N, D), the frames of a clip one after another.
        frames: Frames of a clip, T.
        edge: What a missing neighbour is. "mask" leaves it out of the softmax, so that a static video gives the image
            model's output. "zero" puts N zero keys and values into the softmax, as the published code does.

    Returns:
        (B * frames, N, D).
    """
    projected = F.linear(x, attention.in_proj_weight, attention.in_proj_bias)
    q, k, v = rearrange(projected, "(b t) n (qkv h d) -> qkv b h (t n) d", t=frames, qkv=3, h=attention.num_heads)
    dropout = attention.dropout if attention.training else 0.0
    attended = []
    for queries, keys, values in zip(
        q.split(x.shape[1], dim=2), neighbourhoods(k, frames), neighbourhoods(v, frames), strict=True
    ):
        if edge == "zero":
            missing = 3 * x.shape[1] - keys.shape[2]
            keys, values = (F.pad(z, (0, 0, 0, missing)) for z in (keys, values))
        attended.append(F.scaled_dot_product_attention(queries, keys, values, dropout_p=dropout).transpose(1, 2))
    return attention.out_proj(rearrange(torch.stack(attended, dim=1), "b t n h d -> (b t) n (h d)"))


def neighbourhoods(z: Tensor, frames: int) -> tuple[Tensor, ...]:
    """For each frame, what it sees of the tokens (B, heads, frames * N, d): a slice of them."""
    has_gradient = z.requires_grad and torch.is_grad_enabled()
    return (_Neighbourhoods.apply if has_gradient else _Neighbourhoods.forward)(z, frames)


def _parts(z: Tensor, frames: int) -> list[slice]:
    tokens = z.shape[2] // frames
    return [slice(max(0, t - 1) * tokens, min(frames, t + 2) * tokens) for t in range(frames)]


class _Neighbourhoods(torch.autograd.Function):
    """The slices, with the gradient summed up in one tensor: that of a slice is a tensor of the whole size each time,
    of zeros but for the slice, and summing those took a quarter of the layer's time."""

    @staticmethod
    def forward(z: Tensor, frames: int) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return tuple(z[:, :, part] for part in _parts(z, frames))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int], output: tuple[Tensor, ...]) -> None:
        ctx.shape, ctx.frames = inputs[0].shape, inputs[1]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[0].new_zeros(ctx.shape)
        for part, gradient in zip(_parts(total, ctx.frames), gradients, strict=True):
            total[:, :, part] += gradient
        return total, None
