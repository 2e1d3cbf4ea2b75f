"""A model at hand: a video and labels in words → probabilities, at any anchor weight."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub import ModelHubMixin
from torch import Tensor

from applications.openvclip import distributed
from applications.openvclip.config import ModelConfig
from applications.openvclip.data.sampling import Sampling
from applications.openvclip.data.storage import Cache
from applications.openvclip.data.transforms import Normalisation, normalised
from applications.openvclip.data.views import EvaluationViews
from applications.openvclip.inference import hub
from applications.openvclip.inference.calibration import NONE_OF_THESE, Calibration
from applications.openvclip.inference.labels import Labels, LabelSet, label_set
from applications.openvclip.inference.loading import Loaded, downloaded, load, twice
from applications.openvclip.model.classifier import class_embeddings
from applications.openvclip.model.temporal_attention import Edge
from applications.openvclip.model.video_encoder import VideoEncoder
from interpolate import load_weights, patch

_KEPT_LABEL_SETS = 64


class Classifier(ModelHubMixin):
    """Recognises what videos show among labels in words.

    The anchor and the fine-tuned weights stay in memory: another `anchor_weight` is an interpolation, not a load.
    Without fine-tuned weights it is the pretrained image model on every frame (CLIP*). Threads may share it.
    `from_pretrained`, `save_pretrained` and `push_to_hub` are those of huggingface_hub; what they move is a run.

    Args:
        loaded: A model (`loading.load`).
        cache: For videos behind URLs.

    Example:
        >>> classifier = Classifier.load(model="miniature")
        >>> classifier.embeddings_of(["square", "cloud"]).shape
        torch.Size([2, 128])
    """

    _hub_mixin_config: dict[str, Any] | Any | None = MappingProxyType({})  # or it copies what a classifier is made of

    def __init__(self, loaded: Loaded, cache: Cache | None = None) -> None:
        source = loaded.source
        self.loaded = loaded
        self.views = EvaluationViews(loaded.sampling, source.image_size, cache or Cache())
        """Reads a video's views by its path or URL; can be sent to other processes."""
        self.templates = loaded.templates
        self.normalisation = Normalisation(source.image_mean, source.image_std)
        self.encoder = VideoEncoder(source.clip, temporal=loaded.theta is not None, edge=loaded.model.edge).eval()
        self._anchor = distributed.here(loaded.anchor)
        self._theta = self._anchor if loaded.theta is None else distributed.here(loaded.theta)
        self._embeddings: dict[tuple[LabelSet, tuple[str, ...]], Tensor] = {}
        self._lock = threading.RLock()
        self._name = "OWNER/NAME"  # on the hub, once it is known
        self.anchor_weight = loaded.anchor_weight

    @classmethod
    def load(
        cls,
        source: str | Path | None = None,
        *,
        anchor_weight: float | None = None,
        model: str | None = None,
        pretrained: str | None = None,
        edge: Edge = "mask",
        sampling: Sampling | None = None,
        templates: Sequence[str] | None = None,
    ) -> Classifier:
        """A classifier from a run, a file of weights, the hub, or of pretrained weights alone.

        Args:
            source: Folder of a run; a file of fine-tuned weights, or its URL, with `model` and `pretrained` for the
                anchor; a model of the Hugging Face hub, as OWNER/NAME; or None, for the pretrained weights alone.
            anchor_weight: Weight of the anchor, in [0, 1]; by default the run's, and for a file 0.5, or 0 if it is
                patched already.
            model: The anchor's architecture: "miniature", or a name of open_clip. A run has its own.
            pretrained: Its weights: a tag of open_clip or a file.
            edge: What the first and last frame see (`VideoEncoder`); that of published checkpoints is found out.
            sampling: Which frames are looked at; by default the run's, and the published sampling for a file.
            templates: Sentences that labels are put into; by default the run's, and the published ones for a file.

        Raises:
            ValueError: `source` is a file and `model` is missing, `pretrained` is given for the miniature, or a
                setting is out of its range.
        """
        if model is None and source is None:
            raise ValueError("a classifier needs a source or a model: Classifier.load(model='miniature') is the least.")
        if model == "miniature" and pretrained is not None:
            raise ValueError(
                f"--model.pretrained {pretrained}: the miniature has weights of its own; say whose weights these are, "
                "such as --model.name ViT-B-16."
            )
        loaded = load(source, ModelConfig(model or "", pretrained, edge))
        if loaded.patched and anchor_weight:
            warnings.warn(twice(str(source)), stacklevel=2)
        used = replace(
            loaded,
            anchor_weight=loaded.anchor_weight if anchor_weight is None else anchor_weight,
            sampling=sampling or loaded.sampling,
            templates=loaded.templates if templates is None else tuple(templates),
        )
        if (used.sampling, used.templates) != (loaded.sampling, loaded.templates):
            used = replace(used, calibrations={})  # they say nothing of other frames and sentences
        return cls(used)

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> str | None:
        """Write the run for others: settings, weights, results, and a card (`hub.write_folder`)."""
        folder = hub.ended_run(self.loaded)
        if Path(save_directory).resolve() == folder.path.resolve():
            # the mixin begins by deleting the settings that are there
            raise ValueError(f"{save_directory} is the run itself; write what is for others somewhere else.")
        self._name = options.get("repo_id") or self._name
        return super().save_pretrained(save_directory, **options)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload what `save_pretrained` writes."""
        hub.ended_run(self.loaded)  # or a repository is made first
        self._name = repo_id
        return super().push_to_hub(repo_id, **options)

    def _save_pretrained(self, save_directory: Path) -> None:
        hub.write_folder(self.loaded, save_directory, self._name)

    @classmethod
    def _from_pretrained(cls, *, model_id: str, **options: Any) -> Classifier:
        if Path(model_id).is_dir():
            return cls.load(model_id)
        names = ("revision", "cache_dir", "force_download", "local_files_only", "token")
        return cls.load(downloaded(model_id, **{name: options[name] for name in names}))

    @property
    def embedding_size(self) -> int:
        """Of videos and labels, E."""
        return int(self.encoder.visual.output_dim)

    @property
    def anchor_weight(self) -> float:
        """Weight of the anchor in the model, in [0, 1]: 0 is the fine-tuned weights. It can be set."""
        return self._anchor_weight

    @anchor_weight.setter
    def anchor_weight(self, anchor_weight: float) -> None:
        if self.loaded.theta is None and anchor_weight != 1:
            raise ValueError(f"anchor_weight: there are no fine-tuned weights, so it is 1, got {anchor_weight}.")
        with self._lock:
            load_weights(self.encoder, patch(self._anchor, self._theta, anchor_weight=anchor_weight))
            self._anchor_weight = anchor_weight

    @contextmanager
    def at(self, anchor_weight: float) -> Iterator[Classifier]:
        """This classifier at another anchor weight for a `with` block, in which other threads wait.

        Read videos (`views`) before it.
        """
        with self._lock:
            before = self.anchor_weight
            self.anchor_weight = anchor_weight
            try:
                yield self
            finally:
                self.anchor_weight = before

    @property
    def calibration(self) -> Calibration:
        """How sure it may be at the present anchor weight.

        Raises:
            ValueError: That has not been found out.
        """
        at = f"{self.anchor_weight:g}"
        if at not in self.loaded.calibrations:
            there = ", ".join(self.loaded.calibrations) or "none"
            raise ValueError(
                f"none of these, or several: at anchor weight {at} there is no calibration of this model, its sampling "
                f"and templates (anchor weights with one: {there}); `openvclip calibrate RUN --data VIDEOS "
                f"--anchor-weight {at}` makes it."
            )
        return self.loaded.calibrations[at]

    def classify(
        self, video: str | Path, labels: Labels, *, none_of_these: bool = False, multi_label: bool = False
    ) -> dict[str, float]:
        """What a video shows: each label with its probability, best first. They sum to 1, unless it may show several.

        Args:
            video: A file or URL.
            labels: Names of classes; or, by class, the names by which it is to be known, of which the mean is taken.
            none_of_these: Whether it may be none of them, an answer of that name; the probabilities are calibrated
                then. It takes a run that was calibrated (`openvclip calibrate`).
            multi_label: Whether it may show several of them: the probability of each is its own, against none of these
                as if there were no other label. That takes a run that was calibrated, too.

        Raises:
            VideoReadError: The video can't be read; the message says why.
            ValueError: A label set that is none, no calibration at this anchor weight, or both kinds of answers.
        """
        kind = {"none_of_these": none_of_these, "multi_label": multi_label}
        self.answers(labels, **kind)  # a mistake is found before the video is read
        return self.ranked(self.embed(self.read(video)), labels, **kind)

    def answers(self, labels: Labels, *, none_of_these: bool = False, multi_label: bool = False) -> list[str]:
        """What can be answered: the labels and, if it is asked for, "none of these".

        Raises:
            ValueError: As `classify`.
        """
        names = [label for label, _ in label_set(labels)]
        if none_of_these and multi_label:
            raise ValueError("none of these and multi-label: give one; of several labels, none may be probable anyway.")
        if (none_of_these or multi_label) and self.calibration and NONE_OF_THESE in names:
            raise ValueError(f"labels: {NONE_OF_THESE!r} is the answer where no label fits; leave it out of them.")
        self.embeddings_of(labels)
        return [*names, NONE_OF_THESE] if none_of_these else names

    def features(self, video: str | Path) -> Tensor:
        """The embedding of a video: (E,), of unit length, to be compared with those of texts and of other videos."""
        return F.normalize(self.embed(self.read(video)).mean(dim=0), dim=0)

    def read(self, video: str | Path) -> Tensor:
        """The views of a video, as bytes: (V, 3, T, H, W) uint8."""
        views, _ = self.views(str(video))
        return torch.from_numpy(views)

    @torch.inference_mode()
    def embed(self, clips: Tensor) -> Tensor:
        """Clips (B, 3, T, H, W) uint8 → the mean of the unit embeddings of each one's frames, (B, E).

        Raises:
            FloatingPointError: One is not finite.
        """
        with self._lock:
            embeddings = self.encoder.embed(
                normalised(clips.to(self.encoder.logit_scale.device), self.normalisation)
            ).float()
        if not embeddings.isfinite().all():
            raise FloatingPointError("the embedding of a clip is not finite; look for nan or inf in the weights.")
        return embeddings

    @torch.inference_mode()
    def logits(self, embeddings: Tensor, classes: Tensor) -> Tensor:
        """Embeddings of clips (B, E) and classes (K, E) → logits (B, K), those of an evaluation."""
        with self._lock:
            return self.encoder.logits(embeddings, classes)

    @torch.inference_mode()
    def embeddings_of(self, labels: Labels) -> Tensor:
        """The embeddings of labels, (K, E), of unit length; computed once for a label set."""
        classes = label_set(labels)
        key = classes, self.templates
        with self._lock:
            if key not in self._embeddings:
                if len(self._embeddings) == _KEPT_LABEL_SETS:
                    del self._embeddings[next(iter(self._embeddings))]
                self._embeddings[key] = self._embedded(classes)
            return self._embeddings[key]

    def _embedded(self, classes: LabelSet) -> Tensor:
        names = list(dict.fromkeys(name for _, names in classes for name in names))
        source = self.loaded.source
        embedded = class_embeddings(source.clip, source.tokenizer, names, self.templates)
        of = dict(zip(names, embedded, strict=True))
        several = [torch.stack([of[name] for name in names]) for _, names in classes]
        # of one name its own embedding, bit for bit
        return torch.stack([e[0] if len(e) == 1 else F.normalize(e.mean(dim=0), dim=0) for e in several])

    def ranked(
        self, embeddings: Tensor, labels: Labels, *, none_of_these: bool = False, multi_label: bool = False
    ) -> dict[str, float]:
        """The embeddings (V, E) of a video's views → each answer with its probability, best first."""
        mean = embeddings.mean(dim=0, keepdim=True)
        kind = {"none_of_these": none_of_these, "multi_label": multi_label}
        (probabilities,) = self.probabilities(mean, labels, **kind).tolist()
        found = zip(self.answers(labels, **kind), probabilities, strict=True)
        return dict(sorted(found, key=lambda pair: -pair[1]))

    def probabilities(
        self, embeddings: Tensor, labels: Labels, *, none_of_these: bool = False, multi_label: bool = False
    ) -> Tensor:
        """Embeddings (B, E) → the probability of each answer, (B, answers) float64."""
        logits = self.logits(embeddings, self.embeddings_of(labels)).double().cpu()
        if multi_label:
            found = self.calibration
            return ((logits - found.threshold) / found.temperature).sigmoid()
        if none_of_these:
            found = self.calibration
            logits = torch.cat([logits, torch.full_like(logits[:, :1], found.threshold)], dim=1) / found.temperature
        return logits.softmax(dim=1)
