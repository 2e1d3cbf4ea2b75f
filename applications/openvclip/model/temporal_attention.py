"""Self-attention over a frame and its neighbours, with the weights of an image tower's attention."""

from __future__ import annotations

from typing import Literal

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
    tokens = x.shape[1]
    projected = F.linear(x, attention.in_proj_weight, attention.in_proj_bias)
    q, k, v = rearrange(projected, "(b t) n (qkv h d) -> qkv b h (t n) d", t=frames, qkv=3, h=attention.num_heads)
    dropout = attention.dropout if attention.training else 0.0
    attended = []
    for t in range(frames):
        first, last = max(0, t - 1), min(frames, t + 2)
        neighbourhood = slice(first * tokens, last * tokens)
        keys, values = k[:, :, neighbourhood], v[:, :, neighbourhood]
        if edge == "zero":
            missing = 3 - (last - first)
            keys, values = (F.pad(z, (0, 0, 0, missing * tokens)) for z in (keys, values))
        queries = q[:, :, t * tokens : (t + 1) * tokens]
        attended.append(F.scaled_dot_product_attention(queries, keys, values, dropout_p=dropout).transpose(1, 2))
    return attention.out_proj(rearrange(torch.stack(attended, dim=1), "b t n h d -> (b t) n (h d)"))
