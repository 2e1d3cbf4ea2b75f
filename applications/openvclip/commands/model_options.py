"""The options of every command that uses a model: which one, and how."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import tyro

from applications.openvclip.config import ModelConfig

if TYPE_CHECKING:
    from applications.openvclip.inference.classifier import Classifier

FLAGS = tyro.conf.FlagCreatePairsOff
"""Options that are off unless they are given: no --no-json beside --json."""

TOY = """\
This is the miniature: a toy model of 1.3 million parameters that knows 320 glyphs, 8 colours and 5 motions, and nothing
of the real world; on other videos its answers mean nothing. For real videos, CLIP itself (weights are downloaded once):
  --model.name ViT-B-16 --model.pretrained openai
and weights fine-tuned from it, such as Open-VCLIP's published ones, with --weights FILE beside that; or a run of your
own with --run FOLDER."""


@dataclass(frozen=True)
class ModelOptions:
    """The model. Without any of these it is the built-in miniature."""

    run: str | None = None
    """Folder of a run, or a model of the Hugging Face hub as OWNER/NAME."""
    weights: str | None = None
    """Fine-tuned weights in a file of Open-VCLIP's, open_clip's or another known form, a path or URL; --model is what
    they were made from."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The pretrained weights."""
    anchor_weight: float | None = None
    """Weight of the pretrained weights in the model, from 0 (fine-tuned) to 1; by default the run's; for a
    file 0.5, or 0 if it is patched already."""
    templates: tuple[str, ...] = ()
    """Sentences that labels are put into, each with a {}; or actions, or objects. By default those of the run."""

    def found_from_anywhere(self) -> ModelOptions:
        """The same with whole paths, to be kept in a file."""

        def whole(path: str | None) -> str | None:
            return os.path.abspath(path) if path and os.path.exists(path) else path

        model = replace(self.model, pretrained=whole(self.model.pretrained))
        return replace(self, run=whole(self.run), weights=whole(self.weights), model=model)

    def classifier(self) -> Classifier:
        """The model, loaded.

        Raises:
            ValueError: Both a run and weights are given, a run and a model, or an empty path.
        """
        from applications.openvclip.inference.classifier import Classifier
        from applications.openvclip.model.prompts import TEMPLATES

        for option, path in (("--run", self.run), ("--weights", self.weights)):
            if path == "":
                raise ValueError(
                    f"{option}: the path is empty, as of a variable that is not set; give one, or no {option}."
                )
        if self.run and self.weights:
            raise ValueError(f"--run {self.run} and --weights {self.weights}: a run has weights of its own; give one.")
        left = vars(ModelConfig())
        given = [f"--model.{name} {value}" for name, value in vars(self.model).items() if value != left[name]]
        if self.run and given:
            raise ValueError(f"--run {self.run} and {' '.join(given)}: a run has a model of its own; give one.")
        named = TEMPLATES.get(self.templates[0]) if len(self.templates) == 1 else None
        return Classifier.load(
            self.run or self.weights,
            anchor_weight=self.anchor_weight,
            model=self.model.name,
            pretrained=self.model.pretrained,
            edge=self.model.edge,
            templates=named or self.templates or None,
        )


def notice(classifier: Classifier) -> str | None:
    """What to say of a toy model and of a run that has not ended, before what they answer."""
    from applications.openvclip.inference.loading import goes_on

    loaded, told = classifier.loaded, []
    if loaded.folder and goes_on(loaded.folder):
        step = loaded.metadata["step"]
        told = [f"{loaded.folder.path} has not ended: what answers is what it had at its last checkpoint, step {step}."]
    return "\n".join(told + [TOY] * (loaded.model.name == "miniature")) or None
