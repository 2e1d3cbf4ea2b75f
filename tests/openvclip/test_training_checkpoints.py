"""Checkpoints of a run in training: whole or not at all, checked, and the same for any number of processes."""

import errno
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from applications.openvclip.training.checkpoints import Checkpoints
from interpolate import CheckpointError, average_files


def a_state(value: float) -> dict[str, Any]:
    return {
        "weights": {"w": torch.full((3, 2), value), "half": torch.full((2,), value, dtype=torch.bfloat16)},
        "sums": {"w": torch.full((3, 2), value, dtype=torch.float64)},
        "scalar": torch.tensor(value),
        "n": {"step": int(value), "rate": value, "name": f"{value}", "none": None, "list": [1, 2.5]},
    }


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    for name in a:
        if isinstance(a[name], dict):
            if not same(a[name], b[name]):
                return False
        elif isinstance(a[name], torch.Tensor):
            if a[name].dtype != b[name].dtype or not torch.equal(a[name], b[name]):
                return False
        elif a[name] != b[name]:
            return False
    return a.keys() == b.keys()


def saved(folder: Path, *steps: int, keep: int = 3) -> Checkpoints:
    checkpoints = Checkpoints(folder, keep=keep)
    for step in steps:
        checkpoints.save(step, a_state(step))
    checkpoints.wait()
    return checkpoints


def test_what_is_loaded_is_what_was_saved_bit_for_bit(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path / "checkpoints", 1, 2)
    state = a_state(0)
    assert checkpoints.load(state) == 2
    assert same(state, a_state(2))


def test_without_a_checkpoint_nothing_is_loaded(tmp_path: Path) -> None:
    state = a_state(7)
    assert Checkpoints(tmp_path / "none", keep=1).load(state) is None
    assert same(state, a_state(7))


def test_the_state_is_that_of_the_call_whatever_training_does_meanwhile(tmp_path: Path) -> None:
    checkpoints, state = Checkpoints(tmp_path, keep=1), a_state(1)
    state["big"] = torch.ones(1_000_000)
    checkpoints.save(1, state)
    for tensor in (state["weights"]["w"], state["big"]):
        tensor.zero_()
    checkpoints.wait()
    loaded = {**a_state(0), "big": torch.empty(1_000_000)}
    checkpoints.load(loaded)
    assert torch.equal(loaded["big"], torch.ones(1_000_000))
    assert torch.equal(loaded["weights"]["w"], torch.ones(3, 2))


def test_only_the_last_few_are_kept(tmp_path: Path) -> None:
    assert saved(tmp_path, 1, 2, 3, 4, keep=2).steps() == [3, 4]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-00000004"]
    with pytest.raises(ValueError, match="keep must be at least 1, got 0"):
        Checkpoints(tmp_path, keep=0)


@pytest.mark.parametrize("harm", ["shorten", "flip", "remove", "unsealed", "emptied"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(tmp_path: Path, harm: str) -> None:
    checkpoints = saved(tmp_path, 1, 2)
    folder = tmp_path / "step-00000002"
    (shard,) = folder.glob("shard-*")
    content = bytearray(shard.read_bytes())
    if harm == "shorten":
        shard.write_bytes(content[:-1])
    elif harm == "flip":
        content[-1] ^= 1
        shard.write_bytes(content)
    elif harm == "remove":
        shard.unlink()
    elif harm == "unsealed":
        (folder / "checksums.json").unlink()
    else:
        (folder / "checksums.json").write_text("{")
    state = a_state(0)
    with pytest.warns(UserWarning, match="step-00000002 is damaged"):
        assert checkpoints.load(state) == 1
    assert same(state, a_state(1))
    assert saved(tmp_path, 2).newest() == 2  # it is written anew over the damaged one


def test_where_no_checkpoint_is_whole_that_is_an_error(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 1)
    next((tmp_path / "step-00000001").glob("shard-*")).unlink()
    with pytest.raises(ValueError, match=r"no checkpoint in .* is whole: .*step-00000001 is damaged"):
        checkpoints.load(a_state(0))


def test_another_state_is_refused_by_name(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 1)
    with pytest.raises(CheckpointError, match=r"another training: 2 of its entries .* such as more/a"):
        checkpoints.load({**a_state(0), "more": {"a": torch.ones(1), "b": 3}})


def test_going_on_from_an_earlier_one_ends_the_damaged_later_ones(tmp_path: Path) -> None:
    saved(tmp_path, 1, 5)
    next((tmp_path / "step-00000005").glob("shard-*")).unlink()
    checkpoints = Checkpoints(tmp_path, keep=1)
    with pytest.warns(UserWarning, match="step-00000005 is damaged .*; going on from step 1"):
        assert checkpoints.load(a_state(0)) == 1
    checkpoints.save(2, a_state(2))
    checkpoints.wait()
    assert checkpoints.steps() == [2]  # and not the damaged one as the last of one to keep


def test_the_best_is_kept_beside_the_last_ones(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    kept = []
    for step, value in enumerate([0.5, 0.7, 0.6, 0.7, 0.8, 0.1], start=1):
        checkpoints.save(step, a_state(step))
        checkpoints.keep_best(step, value)
        kept.append((checkpoints.steps(), Checkpoints(tmp_path, keep=1).best()))
    assert kept == [
        ([1], (1, 0.5)),
        ([1, 2], (2, 0.7)),  # the former best goes with the next that is written
        ([2, 3], (2, 0.7)),
        ([2, 4], (2, 0.7)),
        ([2, 5], (5, 0.8)),
        ([5, 6], (5, 0.8)),
    ]
    with pytest.raises(ValueError, match="highest value, got nan at step 6"):
        checkpoints.keep_best(6, float("nan"))
    with pytest.raises(ValueError, match=r"no checkpoint of step 4 in .*, there are \[5, 6\]"):
        checkpoints.keep_best(4, 1.0)


@contextmanager
def files_no_longer_than(size: int) -> Iterator[None]:
    """The kernel refuses longer ones, as it does when the disk is full."""
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, former[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)


def test_what_does_not_fit_is_raised_by_the_next_call_and_leaves_the_one_before(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 1, keep=1)
    for call in (checkpoints.wait, lambda: checkpoints.save(3, a_state(3))):
        with files_no_longer_than(100_000):
            checkpoints.save(2, {"big": torch.ones(100_000)})
            with pytest.raises(OSError, match=r"the checkpoint of step 2 was not written: .*File too large") as raised:
                call()
        assert raised.value.errno == errno.EFBIG
    checkpoints.save(4, {"no longer text": {4: 5}})
    with pytest.raises(ValueError, match='must be texts without "/", got 4 in no longer text/'):
        checkpoints.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    state = a_state(0)
    assert checkpoints.load(state) == 1
    assert same(state, a_state(1))


def test_where_nothing_can_be_written_that_is_said(tmp_path: Path) -> None:
    (tmp_path / "c").write_text("a file where the folder was")
    checkpoints = Checkpoints(tmp_path / "c", keep=1)
    checkpoints.save(2, a_state(2))
    with pytest.raises(FileExistsError, match=r"the checkpoint of step 2 was not written: .*File exists.*/c'"):
        checkpoints.wait()


def test_an_optimizer_goes_on_as_if_it_had_never_stopped(tmp_path: Path) -> None:
    def make() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2)
        return model, torch.optim.AdamW(model.parameters(), lr=0.1)

    def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            optimizer.zero_grad()
            model(torch.full((1, 3), float(step))).square().sum().backward()
            optimizer.step()

    whole, optimizer = make()
    train(whole, optimizer, range(10))
    half, optimizer = make()
    train(half, optimizer, range(5))
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(5, dict(zip(("model", "optimizer"), get_state_dict(half, optimizer), strict=True)))
    checkpoints.wait()

    rest, optimizer = make()
    state = dict(zip(("model", "optimizer"), get_state_dict(rest, optimizer), strict=True))
    assert checkpoints.load(state) == 5
    set_state_dict(rest, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    train(rest, optimizer, range(5, 10))
    for a, b in zip(whole.parameters(), rest.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_state_of_a_training_is_not_taken_for_weights(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1)
    checkpoints.save(1, dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True)))
    checkpoints.wait()
    with pytest.raises(CheckpointError, match=r"state of a whole training: \d+ of its \d+ tensors are an optimizer's"):
        average_files([tmp_path / "checkpoints" / "step-00000001"], tmp_path / "mean.safetensors")


_ENDLESS = """
import sys, torch
from pathlib import Path
from typing import Any
from applications.openvclip.training.checkpoints import Checkpoints
checkpoints = Checkpoints(Path(sys.argv[1]), keep=2)
step = checkpoints.load(state := {"w": torch.zeros(300_000), "step": 0}) or 0
print(step, flush=True)
while True:
    step += 1
    checkpoints.save(step, {"w": torch.full((300_000,), float(step)), "step": step})
"""


@pytest.mark.slow
def test_a_process_killed_at_any_moment_leaves_a_whole_checkpoint_and_no_litter(tmp_path: Path) -> None:
    folder, last = tmp_path / "checkpoints", 0
    generator = random.Random(0)
    for _ in range(6):
        command = [sys.executable, "-c", _ENDLESS, str(folder)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            began = int(process.stdout.readline())
            assert began >= last
            while max(Checkpoints(folder, keep=2).steps(), default=0) <= began:
                assert process.poll() is None
                time.sleep(0.01)
            time.sleep(generator.random() / 2)
            process.send_signal(signal.SIGKILL)
        state = {"w": torch.zeros(300_000), "step": 0}
        last = Checkpoints(folder, keep=2).load(state) or 0
        assert last > began, "every attempt gets further"
        assert state["step"] == last
        assert torch.equal(state["w"], torch.full((300_000,), float(last)))
