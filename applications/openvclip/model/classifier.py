"""Class embeddings: a zero-shot classifier out of class names."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from applications.openvclip.model.clip import CLIP, Tokenizer

_AT_ONCE = 64
"""Classes whose sentences go through the text tower together."""


def class_embeddings(clip: CLIP, tokenizer: Tokenizer, classes: Sequence[str], templates: Sequence[str]) -> Tensor:
    """One unit vector per class: the mean over templates of its sentences' embeddings, normalised. (K, E).

    The text tower is frozen, so this is computed once per label set.

    Raises:
        ValueError: No class or no template, a class given twice, or a template that has not one "{}".
    """
    if not classes or not templates:
        raise ValueError(f"a classifier needs classes and templates, got {len(classes)} and {len(templates)}.")
    repeated = [name for name, count in Counter(classes).items() if count > 1]
    if repeated:
        raise ValueError(f"{len(repeated)} classes are given more than once: {', '.join(map(repr, repeated[:3]))}.")
    unfit = [text for text in templates if "{}" not in text or len(re.findall("[{}]", text)) > 2]
    if unfit:
        raise ValueError(
            f"the template {unfit[0]!r} must have one '{{}}', for the name of the class, and no other brace."
        )
    parts = [classes[i : i + _AT_ONCE] for i in range(0, len(classes), _AT_ONCE)]
    return torch.cat([_embedded(clip, tokenizer, part, templates) for part in parts])


@torch.no_grad()
def _embedded(clip: CLIP, tokenizer: Tokenizer, classes: Sequence[str], templates: Sequence[str]) -> Tensor:
    tokens = tokenizer([template.format(name) for name in classes for template in templates])
    embeddings = clip.encode_text(tokens.to(clip.logit_scale.device), normalize=True)
    mean = embeddings.view(len(classes), len(templates), -1).mean(dim=1)
    return mean / mean.norm(dim=1, keepdim=True)  # F.normalize would take the norm of another kernel
