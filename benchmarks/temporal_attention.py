"""What attention over three frames costs, against plain attention of each frame and the published procedure.

    python benchmarks/temporal_attention.py

Forward and backward of one layer of ViT-B/16 (2 clips of 8 frames, 197 tokens, 12 heads of width 64), and of the whole
image tower (1 clip). The contenders take turns, so that whatever else the machine does falls on all of them. The floor
is the ratio of the multiplications: a query sees 2.75 N keys on average instead of N; all else is the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from measuring import interleaved, ratios, save
from torch import Tensor, nn

from applications.openvclip.model.temporal_attention import temporal_attention
from applications.openvclip.model.video_encoder import VideoEncoder

CLIPS, FRAMES, TOKENS, HEADS, WIDTH = 2, 8, 197, 12, 768
LAYERS, PATCH = 12, 16
ROUNDS = 9


def published(attention: nn.MultiheadAttention, x: Tensor) -> Tensor:
    """The published procedure: keys and values of three frames copied side by side, zeros beyond the clip."""
    q, k, v = F.linear(x, attention.in_proj_weight, attention.in_proj_bias).chunk(3, dim=-1)

    def expanded(z: Tensor) -> Tensor:
        z = z.unflatten(0, (-1, FRAMES))
        before, after = torch.zeros_like(z), torch.zeros_like(z)
        before[:, 1:], after[:, :-1] = z[:, :-1], z[:, 1:]
        return torch.cat([before, z, after], dim=2).flatten(0, 1)

    q, k, v = (z.unflatten(-1, (HEADS, -1)).transpose(1, 2) for z in (q, expanded(k), expanded(v)))
    weights = (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(dim=-1)
    return attention.out_proj((weights @ v).transpose(1, 2).flatten(2))


def layer() -> dict[str, dict[str, float]]:
    attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
    x = torch.randn(CLIPS * FRAMES, TOKENS, WIDTH, requires_grad=True)
    ways: dict[str, Callable[[], Tensor]] = {
        "plain, frame by frame": lambda: temporal_attention(attention, x, frames=1, edge="mask"),
        "temporal, mask": lambda: temporal_attention(attention, x, frames=FRAMES, edge="mask"),
        "temporal, zero": lambda: temporal_attention(attention, x, frames=FRAMES, edge="zero"),
        "published procedure": lambda: published(attention, x),
    }
    with torch.no_grad():
        torch.testing.assert_close(ways["temporal, zero"](), ways["published procedure"]())
    return against(ways, "plain, frame by frame")


def tower() -> dict[str, dict[str, float]]:
    clip: Any = open_clip.create_model("ViT-B-16", pretrained=None)
    video = torch.randn(1, 3, FRAMES, 224, 224)
    images = video[0].transpose(0, 1)
    return against(
        {
            "open_clip's": lambda: clip.visual(images),
            "frame by frame": lambda: VideoEncoder(clip, temporal=False).encode(video),
            "temporal, mask": lambda: VideoEncoder(clip).encode(video),
        },
        "open_clip's",
    )


def against(ways: dict[str, Callable[[], Tensor]], reference: str) -> dict[str, dict[str, float]]:
    passes = {name: lambda way=way: way().square().sum().backward() for name, way in ways.items()}
    return ratios(interleaved(passes, ROUNDS), reference)


def multiplications(keys: float) -> float:
    """Of a token in a layer, over the width: four projections, scores and their sum."""
    return 4 * WIDTH + 2 * keys


def main() -> None:
    torch.manual_seed(0)
    keys = TOKENS * (3 * FRAMES - 2) / FRAMES  # of a query, on average; the first and last frame have two neighbours
    mlp, patches = 8 * WIDTH, 3 * PATCH**2 / LAYERS  # the latter once for all layers
    floor = multiplications(keys) / multiplications(TOKENS)
    of_tower = (multiplications(keys) + mlp + patches) / (multiplications(TOKENS) + mlp + patches)
    save(
        "temporal_attention",
        {
            "runs": ROUNDS,
            "floor": round(floor, 3),
            "time_over_plain": layer(),
            "floor_of_the_tower": round(of_tower, 3),
            "time_over_the_plain_tower": tower(),
        },
    )


if __name__ == "__main__":
    main()
