"""A trace of a few steps, to see what their time goes into."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from interpolate.atomic import replaced_path

_WAIT, _WARM_UP, _ACTIVE = 1, 1, 3
"""Steps that are let pass, steps that are profiled and not kept, steps of the trace."""
_NEEDED = _WAIT + _WARM_UP + _ACTIVE


class Profile:
    """Writes a trace of the third to fifth step from here, for chrome://tracing or ui.perfetto.dev; then it is idle.

    A context manager. The steps that it profiles are slower; what they learn is the same.

    Args:
        path: The trace, `….json`, or `….json.gz` for a compressed one.

    Warns:
        UserWarning: On leaving the block: fewer steps were taken than a trace needs, and there is none.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
        self._profile = profile(
            activities=activities,
            schedule=schedule(wait=_WAIT, warmup=_WARM_UP, active=_ACTIVE, repeat=1),
            on_trace_ready=self._write,
        )
        self._steps = 0

    def __enter__(self) -> Profile:
        self._profile.start()
        return self

    def step(self) -> None:
        """Tell that a step has ended."""
        self._steps += 1
        if self._steps <= _NEEDED:
            self._profile.step()

    def __exit__(self, *error: object) -> None:
        self._profile.stop()
        if self._steps < _NEEDED:
            text = f"no {self.path}: {self._steps} steps were taken, and a trace needs {_NEEDED}."
            warnings.warn(text, stacklevel=2)

    def _write(self, ready: profile) -> None:
        if self._steps >= _NEEDED:  # not what there is of a run that ends before
            with replaced_path(os.fspath(self.path)) as temporary:
                ready.export_chrome_trace(temporary)
