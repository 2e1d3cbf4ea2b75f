"""The training loop on a small network: its schedule, its guards, and that a resumed run equals one never stopped."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from applications.openvclip.runs.journal import Journal, read_journal
from applications.openvclip.training.optimisation import LearningRate, adamw
from applications.openvclip.training.trainer import Trainer
from interpolate import InterpolatedWeightRegularizer, SWAAverager

STEPS = 8


class Scorer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.Sequential(nn.Flatten(), nn.LazyLinear(6), nn.Tanh(), nn.Linear(6, 4))
        self.tower(torch.zeros(1, 3, 2, 2, 2))

    def forward(self, clips: Tensor, class_embeddings: Tensor) -> Tensor:
        return self.tower(clips) @ class_embeddings.T


def make_trainer(folder: Path, learning_rate: float = 0.1) -> Trainer:
    torch.manual_seed(0)
    model = Scorer()
    return Trainer(
        model,
        class_embeddings=torch.eye(4)[:3],
        optimizer=adamw(model, weight_decay=0.01, betas=(0.9, 0.98)),
        learning_rate=LearningRate(learning_rate, 0.0, warmup_steps=2, total_steps=STEPS, schedule="cosine"),
        regularizer=InterpolatedWeightRegularizer(model, seed=5),
        averager=SWAAverager(model, start_step=3, cycle_steps=2),
        max_gradient_norm=1.0,
        journal=Journal(folder / "journal.jsonl"),
        videos="those of this test",
    )


def batches(first: int = 0) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    clips = torch.randn(STEPS, 5, 3, 2, 2, 2, generator=generator)
    return [(clip, torch.arange(5) % 3) for clip in clips[first:]]


def test_a_resumed_run_equals_one_never_stopped(tmp_path: Path) -> None:
    checkpoint = tmp_path / "training.pt"
    whole = make_trainer(tmp_path)
    whole.fit(batches(), steps_per_epoch=100, checkpoint=checkpoint)
    make_trainer(tmp_path).fit(batches()[:5], steps_per_epoch=5, checkpoint=checkpoint)

    resumed = make_trainer(tmp_path)
    resumed.resume(checkpoint)
    assert resumed.step == 5
    resumed.fit(batches(5), steps_per_epoch=100, checkpoint=checkpoint)
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name])
        assert torch.equal(whole.averager.weights[name], resumed.averager.weights[name])
    assert whole.averager.n_averaged == resumed.averager.n_averaged == 2
    assert whole.regularizer.step == resumed.regularizer.step == STEPS


def test_without_a_checkpoint_nothing_is_resumed(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    trainer.resume(tmp_path / "absent.pt")
    assert trainer.step == 0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_that_is_not_finite_stops_before_the_update(tmp_path: Path, value: float) -> None:
    trainer = make_trainer(tmp_path)
    trainer.fit(batches()[:2], steps_per_epoch=100, checkpoint=tmp_path / "training.pt")
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    clips, labels = batches()[2]
    clips[0, 0, 0, 0, 0] = value
    with pytest.raises(FloatingPointError, match=r"step 3 is not finite: .*gradient_norm nan"):
        trainer.train_step(clips, labels)
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.model.state_dict().items())
    assert trainer.step == 2


def test_gradients_are_clipped_and_journaled(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    trainer.fit(batches()[:3], steps_per_epoch=2, checkpoint=tmp_path / "training.pt")
    events = read_journal(tmp_path / "journal.jsonl")
    assert [event["event"] for event in events] == ["step", "step", "checkpoint", "step"]
    assert [event["learning_rate"] for event in events if event["event"] == "step"] == pytest.approx([0.05, 0.1, 0.1])
    assert all(0 <= event["alpha"] < 0.6 for event in events if event["event"] == "step")
    norm = nn.utils.get_total_norm([p.grad for p in trainer.model.parameters()])
    assert norm <= 1 + 1e-5


def test_an_incomplete_last_line_of_a_journal_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_text('{"event": "step", "step": 1}\n{"event": "st')
    assert read_journal(path) == [{"event": "step", "step": 1}]


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
