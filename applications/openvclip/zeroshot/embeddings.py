"""Class embeddings, computed once: by the first process, and kept on the disk for the next time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from torch import Tensor

from applications.openvclip import distributed
from applications.openvclip.data.storage import cache_root
from applications.openvclip.model.classifier import class_embeddings
from applications.openvclip.model.clip import CLIP, Tokenizer
from applications.openvclip.runs.weights import fingerprint, load_weights, save_weights


def kept_class_embeddings(clip: CLIP, tokenizer: Tokenizer, classes: Sequence[str], templates: Sequence[str]) -> Tensor:
    """As `class_embeddings`, (K, E), on every process; for a few hundred classes the text tower takes minutes."""

    def compute() -> Tensor:
        text_tower = {name: p for name, p in clip.named_parameters() if not name.startswith("visual.")}
        key = json.dumps([fingerprint(text_tower), list(classes), list(templates)])
        path = _folder() / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"
        if path.exists():
            return load_weights(path)[0]["class_embeddings"]
        embeddings = class_embeddings(clip, tokenizer, classes, templates)
        with suppress(OSError):  # what can't be kept is computed again
            path.parent.mkdir(parents=True, exist_ok=True)
            save_weights(path, {"class_embeddings": embeddings}, {"classes": json.dumps(list(classes))})
        return embeddings

    return distributed.from_first(compute)


def _folder() -> Path:
    return cache_root() / "class-embeddings"
