"""Write a model as one file that runs without this package.

$ openvclip export runs/miniature-… -o model.onnx
$ openvclip export runs/vit_b_16-… -o model.pt2 --labels "archery,juggling balls" --anchor-weight-as-input
$ openvclip export swa_2_22.pth -o model.onnx --model.name ViT-B-16 --model.pretrained openai --labels labels.txt

Beside it comes labels.json: the classes with their embeddings, and which pixels the model wants to see. The file is run
and compared with the model before it takes its place. examples/classify_exported.py shows how to use it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from applications.openvclip.config import ModelConfig


@dataclass(frozen=True)
class Export:
    """What to write, and where."""

    source: tyro.conf.Positional[str]
    """Folder of a run; a model of the Hugging Face hub as OWNER/NAME; or a file of fine-tuned weights, for which
    --model says what they were made from."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """The file: .onnx for ONNX, .pt2 for torch.export."""
    labels: str | None = None
    """Classes in labels.json, parted by commas, or a file of them; by default those of the run's training."""
    anchor_weight: float | None = None
    """Weight of the anchor in the model; by default the run's."""
    anchor_weight_as_input: bool = False
    """Leave the weight of the anchor open, as the file's third input. The file holds both sets of weights."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The pretrained weights that a file of weights was made from."""


def main(arguments: Sequence[str] | None = None) -> None:
    export(tyro.cli(Export, prog="openvclip export", description=__doc__, args=arguments))


def export(options: Export) -> None:
    """Write the file, and say how far it is from the model."""
    from rich.console import Console

    from applications.openvclip.inference import export
    from applications.openvclip.inference.classifier import Classifier
    from applications.openvclip.inference.labels import read_labels

    classifier = Classifier.load(
        options.source,
        anchor_weight=options.anchor_weight,
        model=options.model.name,
        pretrained=options.model.pretrained,
        edge=options.model.edge,
    )
    classes = classifier.loaded.metadata.get("classes")
    if options.labels is None and classes is None:
        raise ValueError(f"--labels: {options.source} names no classes of its own; say which to write.")
    labels = read_labels(options.labels) if options.labels else json.loads(classes or "[]")
    as_input = options.anchor_weight_as_input
    difference = export.export(classifier, options.output, labels=labels, anchor_weight_as_input=as_input)
    weight = "its third input" if as_input else f"{classifier.anchor_weight:g}"
    for line in (
        f"{options.output}: logits are those of the model within {difference:.1e} ({export.TOLERANCE:g} is allowed)",
        f"the anchor weight is {weight}; {options.output.with_name('labels.json')} has {len(labels)} classes",
    ):
        Console().print(line, soft_wrap=True, highlight=False, markup=False)
