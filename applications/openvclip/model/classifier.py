"""Class embeddings: a zero-shot classifier out of class names."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence

import open_clip
from open_clip.model import CLIP
from torch import Tensor

Tokenizer = Callable[[list[str]], Tensor]


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
    device = clip.logit_scale.device
    return open_clip.build_zero_shot_classifier(clip, tokenizer, classes, templates, 64, device).T.contiguous()
