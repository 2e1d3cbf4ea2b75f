"""What attention over three frames costs, against plain attention of each frame and the published procedure.

    python benchmarks/temporal_attention.py

Forward and backward of one layer of ViT-B/16 (2 clips of 8 frames, 197 tokens, 12 heads of width 64). The contenders
take turns, so that whatever else the machine does falls on all of them. The floor is the ratio of the multiplications:
a query sees 2.75 N keys on average instead of N; the projections are the same.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from measuring import interleaved, ratios, save
from torch import Tensor, nn

from applications.openvclip.model.temporal_attention import temporal_attention

CLIPS, FRAMES, TOKENS, HEADS, WIDTH = 2, 8, 197, 12, 768
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


def main() -> None:
    torch.manual_seed(0)
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
    seconds = interleaved({name: lambda way=way: way().square().sum().backward() for name, way in ways.items()}, ROUNDS)
    keys = TOKENS * (3 * FRAMES - 2) / FRAMES  # of a query, on average; the first and last frame have two neighbours
    save(
        "temporal_attention",
        {
            "runs": ROUNDS,
            "floor": round((4 * WIDTH + 2 * keys) / (4 * WIDTH + 2 * TOKENS), 3),
            "time_over_plain": ratios(seconds, "plain, frame by frame"),
        },
    )


if __name__ == "__main__":
    main()
