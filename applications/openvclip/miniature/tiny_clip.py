"""The tiny CLIP of the miniature, with 1.3 million parameters, and its word tokenizer."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from applications.openvclip.miniature import world
from applications.openvclip.model.clip import PlainCLIP, PretrainedCLIP

WEIGHTS = Path(__file__).with_name("tiny_clip.safetensors")
IMAGE_MEAN = (0.5, 0.5, 0.5)
IMAGE_STD = (0.25, 0.25, 0.25)
CONTEXT_LENGTH = 16


class WordTokenizer:
    """Tokens are whole words of the miniature's vocabulary: `[start, word, …, end, 0, …]`.

    The end token has the largest id, which is how open_clip's argmax pooling finds it. A text that is too long is cut
    before its end token, as open_clip does.
    """

    def __init__(self, words: Sequence[str] | None = None, context_length: int = CONTEXT_LENGTH) -> None:
        self.words = list(words if words is not None else world.vocabulary())
        self.context_length = context_length
        self.start, self.end = 1, len(self.words) + 2
        self.vocab_size = len(self.words) + 3
        self._ids = {word: i for i, word in enumerate(self.words, start=2)}

    def __call__(self, texts: str | Sequence[str]) -> Tensor:
        """Token ids of one or several texts: (n, context_length) int64.

        Raises:
            ValueError: A word is not in the vocabulary; the message names it and the words nearest to it.
        """
        texts = [texts] if isinstance(texts, str) else texts
        tokens = torch.zeros(len(texts), self.context_length, dtype=torch.long)
        for row, text in zip(tokens, texts, strict=True):
            ids = [self._id(word, text) for word in text.lower().replace(".", " ").split()][: self.context_length - 2]
            row[: len(ids) + 2] = torch.tensor([self.start, *ids, self.end])
        return tokens

    def _id(self, word: str, text: str) -> int:
        if word in self._ids:
            return self._ids[word]
        near = difflib.get_close_matches(word, self.words)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"it has {len(self.words)} words only."
        raise ValueError(
            f"the word {word!r} in {text!r} is not in the vocabulary of the miniature world; {hint} Words of the real "
            "world need a model of it, such as --model.name ViT-B-16 --model.pretrained openai."
        )


def build() -> PlainCLIP:
    """The tiny CLIP with fresh random weights: 4 image layers and 2 text layers of width 128, images of 32 pixels."""
    return PlainCLIP(
        embedding_size=128,
        image_size=world.SIZE,
        patch_size=8,
        width=128,
        heads=4,
        image_layers=4,
        text_layers=2,
        context_length=CONTEXT_LENGTH,
        vocab_size=WordTokenizer().vocab_size,
    )


def load_pretrained(device: torch.device) -> PretrainedCLIP:
    """The pre-trained tiny CLIP with its tokenizer and normalisation."""
    return PretrainedCLIP(load().to(device), WordTokenizer(), world.SIZE, IMAGE_MEAN, IMAGE_STD)


def load(path: Path = WEIGHTS) -> PlainCLIP:
    """The pre-trained tiny CLIP, in float32 and evaluation mode.

    Raises:
        FileNotFoundError: The weights are not where the package ships them.
        ValueError: The weights were trained with another vocabulary than this package's.
    """
    if not path.exists():
        raise FileNotFoundError(
            f"{path} does not exist; `python -m applications.openvclip.miniature.pretrain` makes it"
        )
    with safe_open(path, framework="pt") as file:
        words = json.loads(file.metadata()["vocabulary"])
        state = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118 safe_open is no mapping
    if words != world.vocabulary():
        raise ValueError(
            f"{path} was trained with {len(words)} words that are not the {len(world.vocabulary())} of now"
        )
    model = build()
    model.load_state_dict(state)
    return model.eval()
