"""The training loop on a small network: its schedule, its guards, and that a resumed run equals one never stopped."""

import math
import os
import signal
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from applications.openvclip.data.loader import MicroBatch
from applications.openvclip.runs.folder import RunFolder
from applications.openvclip.runs.journal import Journal, read_journal
from applications.openvclip.training.checkpoints import Checkpoints
from applications.openvclip.training.interruption import Interruption
from applications.openvclip.training.monitor import Monitor
from applications.openvclip.training.optimisation import LearningRate, adamw
from applications.openvclip.training.trainer import Saving, Trainer
from applications.openvclip.training.watch import Watch
from tests.openvclip.steps import Plan, small_batches, small_step

STEPS = 8
PLAN = Plan(steps=STEPS)


def make_trainer(folder: Path, plan: Plan = PLAN, every: int | None = None, journaled: bool = False) -> Trainer:
    folder.mkdir(exist_ok=True)
    return Trainer(
        small_step(plan),
        checkpoints=Checkpoints(folder / "checkpoints", keep=2),
        saving=Saving(every_steps=every, every_minutes=10),
        watch=Watch(600),
        monitor=Monitor(Journal(folder / "journal.jsonl"), RunFolder(folder), plan.steps, plan.batch_size, False)
        if journaled
        else None,
        identity={"videos": "those of this test", "pretrained weights": "likewise"},
    )


def fit(trainer: Trainer, micro_batches: Iterator[MicroBatch] | None = None) -> str | None:
    with trainer.monitor or nullcontext(), Interruption() as interruption:
        return trainer.fit(micro_batches or small_batches(trainer.step.order, trainer.step.taken), interruption)


def assert_same(a: Trainer, b: Trainer) -> None:
    for name, tensor in a.step.encoder.state_dict().items():
        assert torch.equal(tensor, b.step.encoder.state_dict()[name])
        assert torch.equal(a.step.averager.weights[name], b.step.averager.weights[name])
    assert a.step.taken == b.step.taken == STEPS
    assert a.step.averager.n_averaged == b.step.averager.n_averaged == 2


class BrokenOffError(Exception):
    """Ends a run without warning."""


def broken_off(batches: Iterator[MicroBatch], after: int) -> Iterator[MicroBatch]:
    for _ in range(after):
        yield next(batches)
    raise BrokenOffError


@pytest.mark.parametrize(("penalty", "taught"), [(False, False), (True, False), (False, True)])
def test_a_resumed_run_equals_one_never_stopped(tmp_path: Path, penalty: bool, taught: bool) -> None:
    plan = Plan(steps=STEPS, penalty=penalty, taught=taught)
    whole = make_trainer(tmp_path / "whole", plan)
    assert fit(whole) is None
    broken = make_trainer(tmp_path / "broken", plan, every=2)
    with pytest.raises(BrokenOffError):
        fit(broken, broken_off(small_batches(broken.step.order), after=5 * plan.batch_size // plan.micro_batch))
    broken.checkpoints.wait()
    resumed = make_trainer(tmp_path / "broken", plan, every=2)
    resumed.resume()
    assert resumed.step.taken == 4
    assert fit(resumed) is None
    assert_same(whole, resumed)


def test_without_a_checkpoint_nothing_is_resumed(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    trainer.resume()
    assert trainer.step.taken == 0
    assert not trainer.step.optimizer.state


def test_a_run_of_other_videos_is_not_gone_on_with(tmp_path: Path) -> None:
    fit(make_trainer(tmp_path))
    other = make_trainer(tmp_path)
    other.identity["videos"] = "others"
    with pytest.raises(ValueError, match="the run was begun with other videos; give back those of then"):
        other.resume()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_ends_training_after_its_step_and_nothing_is_lost(tmp_path: Path, number: signal.Signals) -> None:
    whole = make_trainer(tmp_path / "whole")
    fit(whole)
    trainer = make_trainer(tmp_path / "stopped")

    def signalled(batches: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
        for i, batch in enumerate(batches):
            if i == 9:  # in the midst of the third step
                os.kill(os.getpid(), number)
            yield batch

    assert fit(trainer, signalled(small_batches(trainer.step.order))) == number.name
    assert trainer.step.taken == 3
    assert trainer.checkpoints.steps() == [3]
    resumed = make_trainer(tmp_path / "stopped")
    resumed.resume()
    assert fit(resumed) is None
    assert_same(whole, resumed)


def test_a_signal_after_the_last_step_stops_the_run_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An evaluation of hours would come next."""
    trainer = make_trainer(tmp_path / "run")
    save = trainer.save
    monkeypatch.setattr(trainer, "save", lambda: (save(), os.kill(os.getpid(), signal.SIGTERM)))
    assert fit(trainer) == "SIGTERM"
    resumed = make_trainer(tmp_path / "run")
    resumed.resume()
    assert fit(resumed) is None
    assert_same(trainer, resumed)


@pytest.mark.parametrize(
    ("value", "where"),
    [
        (math.nan, r"It comes from micro-batch 1 on rank 0"),
        (math.inf, r"the gradients of micro-batch 0 .*; micro-batch 1 "),
    ],
)
def test_a_step_that_is_not_finite_stops_before_the_update_and_names_its_videos(
    tmp_path: Path, value: float, where: str
) -> None:
    trainer = make_trainer(tmp_path)

    def spoilt(batches: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
        for i, batch in enumerate(batches):
            if i == 9:
                batch.clips[0, 0, 0, 0, 0] = value
                spoilt_videos.append(batch.videos)
                before.update({name: p.detach().clone() for name, p in trainer.step.encoder.named_parameters()})
            yield batch

    spoilt_videos: list[tuple[str, ...]] = []
    before: dict[str, torch.Tensor] = {}
    with pytest.raises(FloatingPointError, match=r"step 3 is not finite: .*gradient_norm nan.*" + where) as caught:
        fit(trainer, spoilt(small_batches(trainer.step.order)))
    assert ", ".join(spoilt_videos[0]) in str(caught.value)
    assert all(torch.equal(p, before[name]) for name, p in trainer.step.encoder.named_parameters())
    trainer.checkpoints.wait()
    assert trainer.checkpoints.steps() == [2]
    resumed = make_trainer(tmp_path)
    resumed.resume()
    assert resumed.step.regularizer.step == resumed.step.taken == 2


def test_gradients_are_clipped_and_journaled(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, every=4, journaled=True)
    fit(trainer)
    events = read_journal(tmp_path / "journal.jsonl")
    assert [event["event"] for event in events] == [*4 * ["step"], "checkpoint", *4 * ["step"], "checkpoint"]
    steps = [event for event in events if event["event"] == "step"]
    assert [event["learning_rate"] for event in steps[:3]] == pytest.approx([0.05, 0.1, 0.1])
    assert all(0 <= event["alpha"] < 0.6 for event in steps)
    assert steps[-1]["distance"] > 0
    norm = nn.utils.get_total_norm([p.grad for p in trainer.step.encoder.parameters()])
    assert norm <= 1 + 1e-5


def test_faults_of_videos_are_journaled_once(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, journaled=True)

    def faulty(batches: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
        for batch in batches:
            trainer.faults.append(("unreadable", "a.mp4", "nothing in it"))
            yield batch

    fit(trainer, faulty(small_batches(trainer.step.order)))
    (told,) = (event for event in read_journal(tmp_path / "journal.jsonl") if event["event"] == "unreadable")
    assert (told["step"], told["video"], told["reason"]) == (1, "a.mp4", "nothing in it")


@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_low_precision_follows_float32(name: str) -> None:
    whole, low = (small_step(Plan(steps=STEPS, precision=precision)) for precision in ("fp32", name))
    for step in (whole, low):
        batches = small_batches(step.order)
        for _ in range(STEPS):
            values, _ = step(batches)
        assert math.isfinite(values["loss"])
    for (_, a), (_, b) in zip(whole.encoder.named_parameters(), low.encoder.named_parameters(), strict=True):
        assert b.dtype == torch.float32
        torch.testing.assert_close(b, a, rtol=0.3, atol=0.1)


def test_vectors_and_scalars_are_not_decayed() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    model[0].weight.requires_grad_(False)
    model.register_parameter("scale", nn.Parameter(torch.tensor(1.0)))
    decayed, undecayed = adamw(model, weight_decay=0.01, betas=(0.9, 0.98)).param_groups
    assert (len(decayed["params"]), decayed["weight_decay"]) == (0, 0.01)
    assert (len(undecayed["params"]), undecayed["weight_decay"]) == (4, 0.0)


@given(warmup=st.integers(0, 20), total=st.integers(1, 50), step=st.integers(0, 49))
def test_the_learning_rate_stays_in_its_range(warmup: int, total: int, step: int) -> None:
    for schedule in ("constant", "cosine"):
        assert 1e-5 <= LearningRate(1e-3, 1e-5, warmup, total, schedule)(min(step, total - 1)) <= 1e-3


def test_the_schedule_is_the_published_one() -> None:
    rate = LearningRate(3.33e-6, 3.33e-8, warmup_steps=200, total_steps=2200, schedule="cosine")
    assert rate(0) == pytest.approx(3.33e-8 + (3.33e-6 - 3.33e-8) / 200)
    assert rate(199) == rate(200) == pytest.approx(3.33e-6)
    assert rate(1200) == pytest.approx((3.33e-6 + 3.33e-8) / 2)
    assert rate(2199) == pytest.approx(3.33e-8, rel=1e-3)
