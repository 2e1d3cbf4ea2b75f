"""The embeddings of many videos in one file: extracted by any number of processes, resumable, and read back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from applications.openvclip import distributed
from applications.openvclip.inference.classifier import Classifier
from applications.openvclip.model.precision import Precision
from applications.openvclip.runs.weights import fingerprint, load_weights, save_weights
from applications.openvclip.zeroshot.one_pass import Reading, look
from applications.openvclip.zeroshot.passes import Pass
from interpolate.atomic import replacing
from interpolate.weights import trainable_weights

_KIND = "openvclip features"


@dataclass(frozen=True)
class Features:
    """Videos and what they look like."""

    videos: tuple[str, ...]
    """Those that could be read, by path or URL."""
    embeddings: Tensor
    """(N, E), each of unit length."""
    made: dict[str, Any]
    """With what: `model`, the options it was loaded by; `weights`, a fingerprint; `sampling`; `unreadable`, the reason
    of each video that has no features."""


def extract(
    classifier: Classifier,
    videos: Sequence[str],
    folder: Path,
    *,
    workers: int,
    time_limit_s: float,
    batch_size: int = 16,
    advance: Callable[[int], object] = lambda n: None,
) -> tuple[Tensor, dict[str, str]] | None:
    """Look at all videos; processes of torchrun share them. What was looked at before in the same folder is kept.

    Features are the logits of unit vectors, one an axis: the pass is that of an evaluation.

    Returns:
        In the first process the features (N, E), nan for those that could not be read, and the reasons; in the others
        None.
    """
    encoder, loaded = classifier.encoder, classifier.loaded
    axes = torch.eye(classifier.embedding_size, device=encoder.logit_scale.device)
    one = Pass(tuple(videos), tuple(f"axis {i}" for i in range(len(axes))), ("{}",), loaded.sampling)
    reading = Reading(
        size=loaded.source.image_size,
        normalisation=classifier.normalisation,
        workers=workers,
        time_limit_s=time_limit_s,
        batch_size=batch_size,
        cache=classifier.views.cache,
    )
    files = look(
        one,
        {"features": lambda clips, axes: encoder.embed(clips) @ axes.T},
        axes,
        reading,
        folder,
        weights=of_weights(classifier),
        precision=Precision("fp32", axes.device),
        advance=advance,
    )
    if distributed.rank() > 0:
        return None
    found = np.full((len(videos), len(axes)), np.nan, np.float32)
    for indices, logits in files.chunks():
        found[indices] = logits[:, 0].mean(axis=1)  # over views
    return F.normalize(torch.from_numpy(found), dim=1), {
        videos[i]: why for i, why in files.faults("unreadable").items()
    }


def of_weights(classifier: Classifier) -> str:
    """A fingerprint of what features are computed with."""
    encoder = classifier.encoder
    frames = f"edge {encoder.edge}" if encoder.temporal else "every frame alone"
    return f"{fingerprint(trainable_weights(encoder))}, {frames}"


def write_features(path: Path, features: Features) -> None:
    """As safetensors, or as Parquet if the name ends so; whole or not at all.

    Raises:
        RuntimeError: pyarrow, which Parquet takes, is not installed.
    """
    metadata = {"kind": _KIND, "made": json.dumps(features.made)}
    if path.suffix != ".parquet":
        save_weights(path, {"features": features.embeddings}, metadata | {"videos": json.dumps(features.videos)})
        return
    pa, parquet = _pyarrow()
    values = pa.array(features.embeddings.numpy().ravel())
    rows = pa.FixedSizeListArray.from_arrays(values, features.embeddings.shape[1])
    table = pa.table({"video": list(features.videos), "features": rows}).replace_schema_metadata(metadata)
    with replacing(path) as file:
        parquet.write_table(table, file)


def read_features(path: Path) -> Features:
    """What `write_features` wrote.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is something else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; `openvclip features FOLDER -o {path}` makes it.")
    if path.suffix == ".parquet":
        _, parquet = _pyarrow()
        table = parquet.read_table(path)
        metadata = {k.decode(): v.decode() for k, v in (table.schema.metadata or {}).items()}
        if metadata.get("kind") != _KIND:
            raise ValueError(f"{path} holds no features of `openvclip features`.")
        columns = table.combine_chunks()
        flat = np.concatenate([chunk.flatten().to_numpy() for chunk in columns["features"].chunks])
        videos = columns["video"].to_pylist()
        embeddings = torch.from_numpy(flat.reshape(len(videos), -1).copy())
    else:
        tensors, metadata = load_weights(path)
        if metadata.get("kind") != _KIND:
            raise ValueError(f"{path} holds no features of `openvclip features`.")
        videos, embeddings = json.loads(metadata["videos"]), tensors["features"]
    return Features(tuple(videos), embeddings, json.loads(metadata["made"]))


def parts_of(output: Path) -> Path:
    """Where the features are kept that have no file yet."""
    return output.with_name(f".{output.name}.parts")


def remove_parts(output: Path) -> None:
    shutil.rmtree(parts_of(output), ignore_errors=True)


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError as error:
        raise RuntimeError("Parquet takes pyarrow: pip install pyarrow, or name the file .safetensors.") from error
    return pa, parquet
