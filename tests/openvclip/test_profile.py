"""A trace holds the steps that it promises, and there is none rather than a part of one."""

import gzip
import json
from pathlib import Path

import pytest
import torch

from applications.openvclip.training.profile import Profile


def test_a_trace_has_three_steps_of_training_and_what_they_call(tmp_path: Path) -> None:
    path = tmp_path / "trace.json.gz"
    with Profile(path) as profile:
        for i in range(8):
            torch.ones(2, 2 + i) @ torch.ones(2 + i, 2)
            profile.step()
            assert path.exists() == (i >= 4)
    with gzip.open(path, "rt") as file:
        names = [event.get("name", "") for event in json.load(file)["traceEvents"]]
    steps = {name for name in names if name.startswith("ProfilerStep#")}
    assert steps == {"ProfilerStep#2", "ProfilerStep#3", "ProfilerStep#4"}
    assert names.count("aten::mm") == 3
    assert [p.name for p in tmp_path.iterdir()] == ["trace.json.gz"]


@pytest.mark.parametrize("steps", [0, 1, 4])
def test_a_run_that_is_too_short_for_a_trace_says_so_and_leaves_none(tmp_path: Path, steps: int) -> None:
    def train() -> None:
        with Profile(tmp_path / "trace.json.gz") as profile:
            for _ in range(steps):
                profile.step()

    with pytest.warns(UserWarning, match=f"trace.json.gz: {steps} steps were taken, and a trace needs 5"):
        train()
    assert not list(tmp_path.iterdir())
