"""The end of a run: the weights that it leaves, and what they are worth."""

from __future__ import annotations

import json
import warnings
from typing import TYPE_CHECKING

from rich.console import Console

from applications.openvclip import distributed
from applications.openvclip.commands.report import report
from applications.openvclip.config import to_dict
from applications.openvclip.inference.loading import so_far
from applications.openvclip.runs.weights import fingerprint, save_weights
from applications.openvclip.training.parallel import whole
from interpolate import patch
from interpolate.weights import trainable_weights

if TYPE_CHECKING:
    from applications.openvclip.training_run import Run


def conclude(run: Run) -> None:
    """Write the last weights, their average, the patched model and the best on the way, and evaluate; all processes
    call it together."""
    step, folder = run.trainer.step, run.folder
    last = whole(trainable_weights(step.encoder))
    averaged, n_averaged = step.average()
    weight = run.config.evaluation.anchor_weight
    written = {
        folder.last: (last, f"fine-tuned weights after step {step.taken}"),
        folder.averaged: (averaged, f"mean of {n_averaged or 1} fine-tuned weights"),
        folder.patched: (patch(run.anchor, averaged, anchor_weight=weight), f"patched, anchor weight {weight:g}"),
    }
    best = distributed.on_first(run.trainer.checkpoints.best)
    if best and best[0] < step.taken:
        try:
            found = so_far(folder, run.config, run.evaluation.clip, step=best[0])[0]
            written[folder.best] = found, f"fine-tuned weights at step {best[0]}, the best on the way ({best[1]:.4g})"
        except ValueError as error:  # it is damaged, which is no reason to end without a model
            warnings.warn(f"{folder.best.name} is left out: {error}", stacklevel=2)
    metadata = {
        "anchor": fingerprint(run.anchor),
        "seed": str(run.config.seed),
        "step": str(step.taken),
        "classes": json.dumps(run.clips.manifest.classes),
    }

    def write() -> None:
        folder.best.unlink(missing_ok=True)  # of an earlier end
        rest = run.evaluation.clip.state_dict()  # with the text tower, so that it loads wherever such a CLIP does
        for path, (weights, content) in written.items():
            save_weights(path, rest | weights, metadata | {"content": content})
        for fault, what in (
            ("unreadable", "could not be read and were replaced by others"),
            ("cut-off", "are cut off and were used as far as they go"),
        ):
            if n := sum(kind == fault for kind, _ in run.trainer.reported):
                Console().print(f"{n} videos {what}: see {folder.journal}", soft_wrap=True)

        if step.taken < (last_step := step.learning_rate.total_steps):
            told = f"the run ends at step {step.taken} of {last_step}, with a mean of {n_averaged} snapshots"
            Console().print(told if n_averaged else f"{told}: the weights of that step stand for it", soft_wrap=True)

    distributed.on_first(write)
    report(folder, run.evaluation(run.anchor, averaged, folder.logits, last=last), to_dict(run.config))
    if distributed.rank() == 0:
        run.journal.write("end", step=step.taken)
