"""A model as one file that runs without this package: ONNX, or a program of torch.export."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from applications.openvclip.data.transforms import Normalisation, normalised
from applications.openvclip.inference.classifier import Classifier
from applications.openvclip.inference.labels import Labels, label_set
from applications.openvclip.model.video_encoder import VideoEncoder
from applications.openvclip.runs.texts import write_text

TOLERANCE = 1e-4
"""How far a logit of the written file may be from the live model's."""

_ONE_FILE = 1 << 30
"""Bytes of weights above which ONNX keeps them in a file beside: one of its own holds 2 GB at most."""

_Inputs = tuple[Tensor, ...]
_Run = Callable[..., Tensor]


class Exportable(nn.Module):
    """What the file computes: (video, class_embeddings[, anchor_weight]) → logits.

    | input | shape | type |
    |---|---|---|
    | video | (B, 3, T, H, W), RGB | uint8 |
    | class_embeddings | (K, E), of unit length | float32 |
    | anchor_weight, where it is an input | () | float32 |

    The logits are (B, K). B and K are free; T, H and W are those of the model. The mean and deviation of the channels
    are part of the file, so that pixels go in as they come from a decoder.

    Args:
        classifier: The model; its present anchor weight is the fixed one.
        anchor_weight_as_input: Whether the file holds both the fine-tuned weights and the anchor, and mixes them when
            it runs; it is twice as big.
    """

    def __init__(self, classifier: Classifier, *, anchor_weight_as_input: bool) -> None:
        super().__init__()
        loaded = classifier.loaded
        if anchor_weight_as_input and loaded.theta is None:
            raise ValueError("--anchor-weight-as-input: there are no fine-tuned weights that the anchor mixes with.")
        # its weights are the classifier's own, which are those of the present anchor weight
        encoder = VideoEncoder(loaded.source.clip, temporal=loaded.theta is not None, edge=loaded.model.edge)
        self.normalisation = Normalisation(loaded.source.image_mean, loaded.source.image_std)
        self.names = list(loaded.anchor) if anchor_weight_as_input else []
        self.anchor = nn.ParameterList(loaded.anchor[name] for name in self.names)
        self.theta = nn.ParameterList((loaded.theta or {})[name] for name in self.names)
        # in a list it is no part of this module, and a third set of weights no part of the file
        self.encoder, self.architecture = (None, [encoder.eval()]) if anchor_weight_as_input else (encoder, [])

    def forward(self, video: Tensor, class_embeddings: Tensor, anchor_weight: Tensor | None = None) -> Tensor:
        clips = normalised(video, self.normalisation)
        if self.encoder is not None:
            return self.encoder(clips, class_embeddings)
        assert anchor_weight is not None  # it is an input
        weights = {
            name: torch.lerp(theta, anchor, anchor_weight)
            for name, anchor, theta in zip(self.names, self.anchor, self.theta, strict=True)
        }
        return functional_call(self.architecture[0], weights, (clips, class_embeddings))


def export(classifier: Classifier, path: Path, *, labels: Labels, anchor_weight_as_input: bool = False) -> float:
    """Write a model as ONNX or as a program of torch.export, and `labels.json` beside it.

    The file is run before it takes its place, on one and several videos and classes, and compared with the model.

    Args:
        classifier: The model, at the anchor weight that is to be fixed.
        path: Ends in .onnx or .pt2.
        labels: Whose embeddings go into `labels.json`; any others do as well, as long as CLIP's text tower makes them.
        anchor_weight_as_input: Whether the anchor weight is a third input, and not fixed.

    Returns:
        The largest difference of a logit between the file and the model.

    Raises:
        ValueError: Another suffix.
        FloatingPointError: The file computes something else than the model; nothing is written.
    """
    if path.suffix not in _FORMS:
        raise ValueError(f"-o: the file's name says what to write, and ends in .onnx or .pt2; got {path.name!r}.")
    write, read = _FORMS[path.suffix]
    facts = _facts(classifier, labels, anchor_weight_as_input)  # a mistake among the labels is found first
    model = Exportable(classifier, anchor_weight_as_input=anchor_weight_as_input).eval()
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        written = Path(folder) / path.name
        write(model, _inputs(classifier, 2, 3, 0.5 if anchor_weight_as_input else None), written)
        difference = _difference(read(written), classifier, anchor_weight_as_input)
        if not difference <= TOLERANCE:
            raise FloatingPointError(
                f"{path} was not written: its logits differ from the model's by {difference:.1e}, more than "
                f"{TOLERANCE:g}. Another version of torch or onnxruntime may do better."
            )
        for file in sorted(written.parent.iterdir(), reverse=True):  # large weights first, then what refers to them
            file.replace(path.parent / file.name)
    write_text(path.with_name("labels.json"), json.dumps(facts) + "\n")
    return difference


def _write_pt2(model: Exportable, inputs: _Inputs, path: Path) -> None:
    torch.export.save(_program(model, inputs), path)


def _write_onnx(model: Exportable, inputs: _Inputs, path: Path) -> None:
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    names = ["video", "class_embeddings", "anchor_weight"][: len(inputs)]
    torch.onnx.export(
        _program(model, inputs),
        (),
        path,
        input_names=names,
        output_names=["logits"],
        dynamo=True,
        external_data=size > _ONE_FILE,
        verbose=False,
    )


def _program(model: Exportable, inputs: _Inputs) -> torch.export.ExportedProgram:
    free: list[dict[int, torch.export.Dim]] = [{0: torch.export.Dim("B")}, {0: torch.export.Dim("K")}, {}]
    shapes = [*free[: len(inputs)], *[None] * (3 - len(inputs))]
    with torch.no_grad():
        return torch.export.export(model, inputs, dynamic_shapes=tuple(shapes[: len(inputs)]))


def _read_pt2(path: Path) -> _Run:
    return torch.export.load(path).module()


def _read_onnx(path: Path) -> _Run:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [argument.name for argument in session.get_inputs()]

    def run(*inputs: Tensor) -> Tensor:
        arrays = [tensor.cpu().numpy() for tensor in inputs]
        return torch.from_numpy(session.run(None, dict(zip(names, arrays, strict=True)))[0])

    return run


_FORMS = {".onnx": (_write_onnx, _read_onnx), ".pt2": (_write_pt2, _read_pt2)}


def _inputs(classifier: Classifier, videos: int, classes: int, anchor_weight: float | None) -> _Inputs:
    """Random ones, the same every time."""
    loaded = classifier.loaded
    random, size = torch.Generator().manual_seed(0), loaded.source.image_size
    clips = torch.randint(256, (videos, 3, loaded.sampling.frames, size, size), generator=random, dtype=torch.uint8)
    embeddings = F.normalize(torch.randn(classes, classifier.embed(clips[:1]).shape[1], generator=random), dim=1)
    weight = () if anchor_weight is None else (torch.tensor(anchor_weight),)
    return tuple(tensor.to(loaded.source.clip.logit_scale.device) for tensor in (clips, embeddings, *weight))


@torch.inference_mode()
def _difference(run: _Run, classifier: Classifier, anchor_weight_as_input: bool) -> float:
    """The largest difference of a logit, on one and on several videos and classes, and along the anchor weight."""
    largest = 0.0
    for videos, classes, weight in ((1, 5, 0.0), (3, 1, 0.3), (2, 4, 1.0)):
        inputs = _inputs(classifier, videos, classes, weight if anchor_weight_as_input else None)
        clips, embeddings, *_ = inputs
        with classifier.at(weight) if anchor_weight_as_input else nullcontext():
            live = classifier.logits(classifier.embed(clips), embeddings)
        found = run(*inputs).to(live.device)
        if found.shape != live.shape or not found.isfinite().all():
            return math.inf
        largest = max(largest, (found - live).abs().max().item())
    return largest


def _facts(classifier: Classifier, labels: Labels, anchor_weight_as_input: bool) -> dict[str, object]:
    """What somebody needs who runs the file: the classes, and which pixels to show it."""
    loaded = classifier.loaded
    return {
        "labels": [label for label, _ in label_set(labels)],
        "class_embeddings": classifier.embeddings_of(labels).tolist(),
        "templates": list(classifier.templates),
        "anchor_weight": "input" if anchor_weight_as_input else classifier.anchor_weight,
        "size": loaded.source.image_size,
        "sampling": asdict(loaded.sampling),
    }
