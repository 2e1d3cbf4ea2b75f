"""CLIP* and the weights along the path from theta to the anchor, under every protocol, from one look at each video."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from torch import Tensor

from applications.openvclip import distributed
from applications.openvclip.model.clip import CLIP, Tokenizer
from applications.openvclip.model.precision import Precision
from applications.openvclip.model.temporal_attention import Edge
from applications.openvclip.model.video_encoder import VideoEncoder
from applications.openvclip.progress import progress_bar
from applications.openvclip.runs.weights import fingerprint
from applications.openvclip.zeroshot.embeddings import kept_class_embeddings
from applications.openvclip.zeroshot.one_pass import Reading, Scorer, at_weights, look
from applications.openvclip.zeroshot.passes import Pass, plan
from applications.openvclip.zeroshot.protocols import Protocol
from applications.openvclip.zeroshot.results import BASELINE, LAST, ProtocolResult
from applications.openvclip.zeroshot.scores import results_of
from interpolate import patch
from interpolate.weights import Weights


@dataclass(frozen=True)
class Evaluation:
    """What to evaluate on, and how; called with weights."""

    clip: CLIP
    edge: Edge
    protocols: Sequence[Protocol]
    passes: Mapping[Pass, tuple[list[Protocol], Tensor]]
    """What to look at once, for which of the protocols, and the embeddings of its classes (`embedded`)."""
    anchor_weights: Sequence[float]
    """Where to evaluate along the path; at 0, the fine-tuned weights themselves, always."""
    precision: Precision
    compile: bool
    reading: Reading
    temperatures: Mapping[str, float] = field(default_factory=dict)
    """Of calibrated models, by anchor weight as text."""

    def __post_init__(self) -> None:
        twice = [name for name, n in Counter(protocol.name for protocol in self.protocols).items() if n > 1]
        if twice:
            raise ValueError(
                f"{', '.join(twice)}: several sets or protocols of this name, and results are kept by name. Evaluate "
                'each once, or give them names of their own: the "name" in a protocol\'s file, the folder of a set.'
            )

    def __call__(
        self,
        anchor: Weights,
        theta: Weights | None,
        folder: Path,
        *,
        last: Weights | None = None,
        advance: Callable[[], object] = lambda: None,
    ) -> list[ProtocolResult]:
        """The accuracies of CLIP* and, where there are fine-tuned weights, at every anchor weight.

        Processes of torchrun share the videos; the first one returns the results, the others none.

        Args:
            anchor: The pretrained weights.
            theta: The fine-tuned weights, under the same names.
            folder: Where logits are kept; an evaluation that was interrupted goes on with them.
            last: The weights that training ended with, a path of their own, unless they are `theta`.
            advance: Called as it gets on; an exception from it ends the evaluation.
        """
        if theta is not None and last is not None and all(theta[name].equal(tensor) for name, tensor in last.items()):
            last = None
        scorers = scorers_of(self.clip, self.edge, anchor, theta, self.anchor_weights, last, compiled=self.compile)
        results: dict[str, ProtocolResult] = {}
        with progress_bar(Console(quiet=distributed.rank() > 0)) as progress:
            task = progress.add_task("evaluating", total=sum(len(one.videos) for one in self.passes))
            for one, (group, embeddings) in self.passes.items():
                progress.update(task, description=f"evaluating, {', '.join(p.name for p in group)}")
                weights = {"classes": embeddings, **{f"anchor {name}": tensor for name, tensor in anchor.items()}}
                weights |= {f"theta {name}": tensor for name, tensor in (theta or {}).items()}
                weights |= {f"last {name}": tensor for name, tensor in (last or {}).items()}
                files = look(
                    one,
                    scorers,
                    embeddings,
                    self.reading,
                    folder,
                    precision=self.precision,
                    weights=f"{fingerprint(weights)}, edge {self.edge}",
                    advance=lambda n: (progress.advance(task, n), advance()),
                )
                if distributed.rank() == 0:
                    results |= {result.protocol: result for result in results_of(group, one, files, self.temperatures)}
        return [results[protocol.name] for protocol in self.protocols] if results else []


def embedded(
    protocols: Sequence[Protocol], clip: CLIP, tokenizer: Tokenizer
) -> dict[Pass, tuple[list[Protocol], Tensor]]:
    """The passes that protocols need, what each is for, and the embeddings of its classes: all but the videos."""
    return {
        one: (group, kept_class_embeddings(clip, tokenizer, one.classes, one.templates))
        for one, group in plan(protocols).items()
    }


def scorers_of(
    clip: CLIP,
    edge: Edge,
    anchor: Weights,
    theta: Weights | None,
    anchor_weights: Sequence[float],
    last: Weights | None = None,
    *,
    compiled: bool = False,
) -> dict[str, Scorer]:
    """CLIP* and, where there are fine-tuned weights, the model at every anchor weight, by name."""
    clip = clip.to(distributed.device())
    per_frame, temporal = VideoEncoder(clip, temporal=False).eval(), VideoEncoder(clip, edge=edge).eval()
    if compiled:
        per_frame.compile()  # in place, so that names stay; weights are inputs: one compilation serves them all
        temporal.compile()
    anchor = distributed.here(anchor)
    scorers = {BASELINE: at_weights(per_frame, anchor)}
    for prefix, tuned in (("", theta), (LAST, last)):
        if tuned is not None:
            tuned = distributed.here(tuned)
            for weight in sorted({0.0, *anchor_weights}):
                patched = patch(anchor, tuned, anchor_weight=weight)
                scorers[f"{prefix}{weight:g}"] = at_weights(temporal, patched)
    return scorers
