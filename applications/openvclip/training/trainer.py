"""Fine-tuning: the loop around its steps, which saves, stops, resumes, and says how it goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

from applications.openvclip import distributed
from applications.openvclip.data.loader import MicroBatch
from applications.openvclip.training.checkpoints import Checkpoints
from applications.openvclip.training.evaluating import Evaluating
from applications.openvclip.training.interruption import Interruption
from applications.openvclip.training.monitor import Monitor
from applications.openvclip.training.parallel import distance
from applications.openvclip.training.profile import Profile
from applications.openvclip.training.step import Step
from applications.openvclip.training.watch import Watch
from interpolate.weights import trainable_weights

_DISTANCE_EVERY = 50
"""Steps between two measurements of the distance from the anchor."""


@dataclass(frozen=True)
class Saving:
    """When a checkpoint is written, besides at the end and when training is stopped."""

    every_steps: int | None
    every_minutes: float


@dataclass
class Trainer:
    """Takes steps until the last, or until it is told to stop; nothing that it has learnt is lost."""

    step: Step
    checkpoints: Checkpoints
    saving: Saving
    watch: Watch
    monitor: Monitor | None
    """Keeps the journal and shows progress, on the first process only."""
    identity: dict[str, str]
    """What must be the same when training goes on, as hashes by name."""
    evaluating: Evaluating | None = None
    profile: Profile | None = None
    """Of this process; it is told of every step."""
    faults: list[tuple[str, str, str]] = field(default_factory=list)
    """What this process has met in videos since the last step: "unreadable" or "cut-off", which video, and why."""
    reported: set[tuple[str, str]] = field(default_factory=set)
    """Of what all processes have met, the faults and videos that are in the journal."""
    evaluated: set[int] = field(default_factory=set)
    """After which steps there has been an evaluation."""
    saved_at: float = 0.0
    """When the last checkpoint was begun, by the monotonic clock."""

    def fit(self, micro_batches: Iterator[MicroBatch], interruption: Interruption) -> str | None:
        """Take the steps that are left. A checkpoint is written on schedule, at the end, and where training is stopped.

        Args:
            micro_batches: Those of this process, beginning with those of the step after `self.step.taken`.
            interruption: Says when to stop.

        Returns:
            The signal that stopped training; None at the end.

        Raises:
            FloatingPointError: A loss or a gradient is not finite. The state before that step has been saved.
            RuntimeError: Another process has ended or does not answer; the message says which.
        """
        step, last = self.step, self.step.learning_rate.total_steps
        step.model.train()
        self.saved_at, stopped = time.monotonic(), 0.0
        with self.watch:
            if self._evaluation_is_due():  # before which a former process was stopped
                self._evaluate(interruption)
            while step.taken < last and not stopped:
                self.watch.step(step.taken + 1)
                try:
                    values, (stopped, due, faults) = step(
                        micro_batches, lambda: (interruption.signal is not None, self._is_due(), len(self.faults))
                    )
                except FloatingPointError:
                    self.save()
                    self.checkpoints.wait()
                    raise
                if step.taken % _DISTANCE_EVERY == 0 or step.taken == last:
                    values["distance"] = distance(trainable_weights(step.encoder), step.regularizer.anchor)
                if faults:
                    self._report_faults()
                if self.monitor:
                    self.monitor.step(step.taken, values, values.pop("waited_s"))
                if self.profile:
                    self.profile.step()
                if due or stopped or step.taken == last or self._evaluation_is_due():
                    self.save()
                if self._evaluation_is_due() and not stopped:
                    self._evaluate(interruption)
            self.checkpoints.wait()
            if not stopped:  # the last step could not know of a signal that came after it
                (stopped,) = distributed.summed([interruption.signal is not None])
        return None if not stopped else interruption.signal or "a signal to another process"

    def _is_due(self) -> bool:
        """Whether a checkpoint is to be written after the step being taken; the first process's clock counts."""
        every = self.saving.every_steps
        late = distributed.rank() == 0 and time.monotonic() - self.saved_at > 60 * self.saving.every_minutes
        return late or (every is not None and (self.step.taken + 1) % every == 0)

    def _evaluation_is_due(self) -> bool:
        due = self.evaluating is not None and self.evaluating.is_due(self.step.taken)
        return due and self.step.taken not in self.evaluated

    def _evaluate(self, interruption: Interruption) -> None:
        """Evaluate what has just been saved; a signal ends it, and it begins again when training goes on."""
        assert self.evaluating is not None
        self.checkpoints.wait()

        def advance() -> None:
            self.watch.step(self.step.taken)  # it may take longer than a step, if only it gets on
            if interruption.signal:
                raise KeyboardInterrupt(interruption.signal)

        with self.monitor.paused() if self.monitor else nullcontext():
            try:
                value, found = self.evaluating(self.step, advance)
            except RuntimeError as error:
                if interruption.signal:  # another process was the first to end
                    raise KeyboardInterrupt(interruption.signal) from error
                raise
        self.checkpoints.keep_best(self.step.taken, value)
        if self.monitor:
            self.monitor.event("evaluation", step=self.step.taken, **found)
        self.evaluated.add(self.step.taken)

    def save(self) -> None:
        """Begin to write a checkpoint of the state as it is."""
        if self.monitor:  # before it is there: a run that goes on from it does not write this line again
            self.monitor.event("checkpoint", step=self.step.taken)
        self.checkpoints.save(self.step.taken, self.state_dict())
        self.saved_at = time.monotonic()

    def resume(self) -> None:
        """Go on from the newest checkpoint that is whole, if there is one; all processes call it together.

        Raises:
            ValueError: The run was begun with other videos or from other weights.
        """
        if not self.checkpoints.steps():
            return
        state = self.state_dict()
        self.checkpoints.load(state)
        unlike = [name for name, value in self.identity.items() if state["identity"][name] != value]
        if unlike:
            raise ValueError(
                f"the run was begun with {' and '.join(f'other {name}' for name in unlike)}; give back those of then "
                "(they may lie elsewhere), or begin a new run."
            )
        self.step.load_state_dict(state["step"])

    def state_dict(self) -> dict[str, Any]:
        return {"identity": dict(self.identity), "step": self.step.state_dict()}

    def _report_faults(self) -> None:
        met = [fault for of_rank in distributed.gathered(self.faults) for fault in of_rank]
        self.faults.clear()
        for fault, video, reason in met:
            if self.monitor and (fault, video) not in self.reported:
                self.monitor.event(fault, step=self.step.taken, video=video, reason=reason)
            self.reported.add((fault, video))
