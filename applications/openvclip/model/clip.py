"""What a CLIP is here: open_clip's class of that name; or `PlainCLIP`, the same of plain blocks alone.

open_clip imports what any of its models may need, torchvision, timm and transformers among it, which takes several
seconds. The miniature and whatever runs on it does not wait for that: it is a `PlainCLIP`.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    import open_clip.model

CLIP: TypeAlias = "open_clip.model.CLIP | PlainCLIP"
Tokenizer = Callable[[list[str]], Tensor]


@dataclass
class PretrainedCLIP:
    """A CLIP and what is needed to feed it."""

    clip: CLIP
    tokenizer: Tokenizer
    image_size: int
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]
    is_of_video: bool = False
    """Whether its weights were fine-tuned on videos by the published code, and so need `edge="zero"`."""


class LayerNorm(nn.LayerNorm):
    """In the precision of its input, under autocast too."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 torch's name
        return super().forward(input).to(input.dtype)


class Block(nn.Module):
    """Attention and a perceptron, each added to its input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ls_1 = nn.Identity()
        self.ln_2 = LayerNorm(width)
        layers = ("c_fc", nn.Linear(width, 4 * width)), ("gelu", nn.GELU()), ("c_proj", nn.Linear(4 * width, width))
        self.mlp = nn.Sequential(OrderedDict(layers))
        self.ls_2 = nn.Identity()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, N, D) → the same."""
        normed = self.ln_1(x)
        x = x + self.attn(normed, normed, normed, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """Blocks, one after another."""

    def __init__(self, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads) for _ in range(layers))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in self.resblocks:
            x = block(x, mask)
        return x


class ImageTower(nn.Module):
    """A vision transformer whose answer is that of its class token."""

    def __init__(self, size: int, patch: int, width: int, layers: int, heads: int, output_dim: int) -> None:
        super().__init__()
        self.image_size = size, size
        self.output_dim = output_dim
        scale = width**-0.5
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(scale * torch.randn(width))
        self.positional_embedding = nn.Parameter(scale * torch.randn((size // patch) ** 2 + 1, width))
        self.ln_pre = LayerNorm(width)
        self.transformer = Transformer(width, layers, heads)
        self.ln_post = LayerNorm(width)
        self.proj = nn.Parameter(scale * torch.randn(width, output_dim))

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) → (B, E)."""
        pooled, _ = self._pool(self.transformer(self._embeds(images)))
        return pooled @ self.proj

    def _embeds(self, images: Tensor) -> Tensor:
        patches = self.conv1(images).flatten(2).mT
        # len() is a number, which torch.export takes for the only batch size there will be
        token = self.class_embedding.to(patches.dtype).expand(patches.shape[0], 1, -1)
        return self.ln_pre(torch.cat([token, patches], dim=1) + self.positional_embedding.to(patches.dtype))

    def _pool(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.ln_post(x)
        return x[:, 0], x[:, 1:]


class PlainCLIP(nn.Module):
    """An image tower and a text tower of plain blocks, with the names of open_clip's `CLIP`: weights of one fit the
    other, which gives the same for them; so do fresh ones, after the same seed.

    Args:
        embedding_size: Of images and texts, E.
        image_size: Height and width, in pixels.
        patch_size: Of the squares that become tokens.
        width: Of both towers.
        heads: Of both towers' attention.
        image_layers: Blocks of the image tower.
        text_layers: Blocks of the text tower.
        context_length: Tokens of a text.
        vocab_size: Tokens that there are; the last one ends a text.
    """

    def __init__(
        self,
        *,
        embedding_size: int,
        image_size: int,
        patch_size: int,
        width: int,
        heads: int,
        image_layers: int,
        text_layers: int,
        context_length: int,
        vocab_size: int,
    ) -> None:
        super().__init__()
        self.visual = ImageTower(image_size, patch_size, width, image_layers, heads, embedding_size)
        tokens = nn.Embedding(vocab_size, width)  # drawn before and registered after the blocks, as open_clip does
        self.transformer = Transformer(width, text_layers, heads)
        self.token_embedding = tokens
        self.ln_final = LayerNorm(width)
        self.positional_embedding = nn.Parameter(torch.empty(context_length, width))
        self.text_projection = nn.Parameter(torch.empty(width, embedding_size))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        mask = torch.full((context_length, context_length), -torch.inf).triu(1)  # a token sees those before it
        self.register_buffer("attn_mask", mask, persistent=False)
        self._draw()

    def _draw(self) -> None:
        """Fresh weights of the text tower."""
        width, layers = self.token_embedding.embedding_dim, len(self.transformer.resblocks)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        for block in self.transformer.resblocks:
            assert isinstance(block, Block)
            nn.init.normal_(block.attn.in_proj_weight, std=width**-0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=width**-0.5 * (2 * layers) ** -0.5)
            nn.init.normal_(block.mlp.get_parameter("c_fc.weight"), std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.get_parameter("c_proj.weight"), std=width**-0.5 * (2 * layers) ** -0.5)
        nn.init.normal_(self.text_projection, std=width**-0.5)

    def encode_image(self, images: Tensor, normalize: bool = False) -> Tensor:
        """(B, 3, H, W) → (B, E)."""
        features = self.visual(images)
        return F.normalize(features, dim=-1) if normalize else features

    def encode_text(self, tokens: Tensor, normalize: bool = False) -> Tensor:
        """(B, context_length) int64 → (B, E)."""
        x = self.transformer(self.token_embedding(tokens) + self.positional_embedding, self.attn_mask)
        ends = tokens.argmax(dim=-1)
        features = self.ln_final(x)[torch.arange(len(x), device=x.device), ends] @ self.text_projection
        return F.normalize(features, dim=-1) if normalize else features

    def forward(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Unit embeddings of images and texts (B, E), and the scale of their products."""
        return self.encode_image(images, True), self.encode_text(tokens, True), self.logit_scale.exp()
