"""Evaluation while training goes on: it is what is learnt that is evaluated, and it changes nothing of it."""

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from applications.openvclip import train
from applications.openvclip.config import InTrainingConfig
from applications.openvclip.runs.folder import RunFolder
from applications.openvclip.runs.journal import Journal, read_journal
from applications.openvclip.training.checkpoints import Checkpoints
from applications.openvclip.training.evaluating import Accuracies, Evaluating
from applications.openvclip.training.interruption import Interruption
from applications.openvclip.training.monitor import Monitor
from applications.openvclip.training.trainer import Saving, Trainer
from applications.openvclip.training.watch import Watch
from applications.openvclip.training_run import evaluated_in_training
from tests.openvclip import steps
from tests.openvclip.steps import Plan, Scorer, small_batches, small_step

PLAN = Plan(steps=8, penalty=True)
"""With an average that begins after step 5."""


class Restless(Scorer):
    """What a network may have that looking at it could change: statistics of its batches, and noise."""

    def __init__(self) -> None:
        super().__init__()
        self.tower.insert(2, nn.BatchNorm1d(6))
        self.tower.insert(3, nn.Dropout(0.5))


@pytest.fixture(autouse=True)
def restless(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "Scorer", Restless)
    monkeypatch.setattr(Monitor, "_draw", lambda self: None)


def small_trainer(folder: Path, every_steps: int | None = 2) -> Trainer:
    """One whose evaluation computes with the weights, in the trained modules, and draws random numbers."""
    step = small_step(PLAN)

    @torch.inference_mode()
    def accuracies(weights: dict[str, Tensor], advance: Any) -> Accuracies:
        advance()
        torch.nn.init.normal_(torch.empty(3))
        model = step.encoder.eval()
        clips = torch.ones(5, 3, 2, 2, 2)
        torch.func.functional_call(model, dict(weights), (clips, torch.eye(4)))
        seen = sum(float(tensor.double().sum()) for tensor in weights.values())
        return {"closed": {"0.5": seen, "1": 1.0}, "held-out": {"0.5": 0.25, "1": 1.0}}

    journal = Journal(folder / "journal.jsonl")
    return Trainer(
        step,
        checkpoints=Checkpoints(folder / "checkpoints", keep=2),
        saving=Saving(every_steps=None, every_minutes=60.0),
        watch=Watch(60.0),
        monitor=Monitor(journal, RunFolder(folder), PLAN.steps, PLAN.batch_size, tensorboard=False),
        identity={},
        evaluating=None if every_steps is None else Evaluating(every_steps, accuracies, 0.5, ("closed",)),
    )


def fit(trainer: Trainer) -> None:
    assert trainer.monitor is not None
    with Interruption() as interruption, trainer.monitor:
        trainer.fit(small_batches(trainer.step.order, trainer.step.taken), interruption)


def events(folder: Path, *kinds: str) -> list[dict[str, Any]]:
    """What does not depend on the clock."""
    found = [event for event in read_journal(folder / "journal.jsonl") if event["event"] in kinds]
    return [{name: value for name, value in e.items() if name not in ("time", "machine")} for e in found]


def test_training_is_the_same_bit_for_bit_whether_it_is_evaluated_on_the_way_or_not(tmp_path: Path) -> None:
    trainers = []
    for name, every_steps in (("plain", None), ("evaluated", 2)):
        (tmp_path / name).mkdir()
        trainers.append(small_trainer(tmp_path / name, every_steps))
        fit(trainers[-1])
    assert events(tmp_path / "plain", "step") == events(tmp_path / "evaluated", "step")
    plain, evaluated = (trainer.step for trainer in trainers)
    assert all(torch.equal(t, evaluated.encoder.state_dict()[name]) for name, t in plain.encoder.state_dict().items())
    assert all(torch.equal(t, evaluated.averager.weights[name]) for name, t in plain.averager.weights.items())
    assert [e["step"] for e in events(tmp_path / "evaluated", "evaluation")] == [2, 4, 6, 8]


def test_what_is_evaluated_is_the_average_so_far_and_before_there_is_one_the_weights(tmp_path: Path) -> None:
    trainer = small_trainer(tmp_path)
    fit(trainer)
    found = events(tmp_path, "evaluation")
    assert [event["weights"] for event in found] == ["last", "last", "mean of 1", "mean of 2"]
    expected = sum(float(tensor.double().sum()) for tensor in trainer.step.averager.weights.values())
    assert found[-1]["accuracy"]["closed"]["0.5"] == found[-1]["value"] == expected


def test_the_checkpoint_of_the_best_is_kept(tmp_path: Path) -> None:
    trainer = small_trainer(tmp_path)
    fit(trainer)
    values = {event["step"]: event["value"] for event in events(tmp_path, "evaluation")}
    best = max(values, key=values.__getitem__)
    assert trainer.checkpoints.best() == (best, values[best])
    assert set(trainer.checkpoints.steps()) == {best, 6, 8}


def test_an_evaluation_that_a_signal_ended_is_made_up_for_when_training_goes_on(tmp_path: Path) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    for folder in (whole, stopped):
        folder.mkdir()
    fit(small_trainer(whole))

    first = small_trainer(stopped)
    assert first.evaluating is not None
    usual = first.evaluating.accuracies

    def signalled(weights: dict[str, Tensor], advance: Any) -> Accuracies:
        if first.step.taken == 4:
            interruption.signal = "SIGTERM"
        return usual(weights, advance)

    first.evaluating = Evaluating(2, signalled, 0.5, ("closed",))
    with Interruption() as interruption, pytest.raises(KeyboardInterrupt), first.monitor or nullcontext():
        first.fit(small_batches(first.step.order), interruption)
    second = small_trainer(stopped)
    second.resume()
    assert second.step.taken == 4
    second.evaluated = {e["step"] for e in events(stopped, "evaluation")}
    assert second.evaluated == {2}
    fit(second)
    for kind in ("step", "evaluation"):
        assert events(stopped, kind) == events(whole, kind)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--in-training.held-out", "ucf"), "no set or protocol ucf; --data.test and .* have zs_object, closed"),
        (("--in-training.best-by", "held-out"), "best-by held-out: there is no such set among zs_object, closed"),
        (("--data.test", "{zs_object}"), "nothing to evaluate on"),
    ],
)
def test_what_cannot_be_evaluated_on_is_named_before_training(small_world, tmp_path, more, message) -> None:
    more = [text.format(**small_world) for text in more]
    with pytest.raises(ValueError, match=message):
        train.main(arguments(small_world, tmp_path / "run", "--in-training.every-epochs", "1", *more))
    assert not (tmp_path / "run").exists()


def test_a_held_out_set_that_is_not_there_is_named_also_where_nothing_is_evaluated_on_the_way() -> None:
    evaluation = InTrainingConfig(held_out="zs_objekt")
    with pytest.raises(ValueError, match=r"--in-training\.held-out: there is no set or protocol zs_objekt"):
        evaluated_in_training([], evaluation)
    assert evaluated_in_training([], replace(evaluation, held_out=None)) == []


def arguments(small_world: dict[str, Path], output: Path, *more: str) -> list[str]:
    """A run of 3 epochs of 4 steps, averaged from the second epoch on."""
    return [
        *("miniature", "--output", str(output), "--data.train", str(small_world["train"])),
        *("--data.test", str(small_world["zs_object"]), str(small_world["closed"])),
        *("--optimization.batch-size", "4", "--averager.start-epoch", "1", "--data.workers", "1"),
        *("--evaluation.anchor-weights", "0", "0.5", "1", *more),
    ]


@pytest.mark.slow
def test_a_run_that_is_evaluated_on_the_way_is_that_of_one_that_is_not_and_its_last_is_the_result(
    small_world: dict[str, Path], tmp_path: Path
) -> None:
    evaluated = ("--in-training.every-epochs", "1", "--in-training.held-out", "zs_object", "--tensorboard", "--profile")
    train.main(arguments(small_world, tmp_path / "plain"))
    train.main(arguments(small_world, tmp_path / "evaluated", *evaluated))
    folder = tmp_path / "evaluated"
    assert events(tmp_path / "plain", "step") == events(folder, "step")
    for name in ("last", "averaged", "patched"):
        one, other = (load_file(path / f"{name}.safetensors") for path in (tmp_path / "plain", folder))
        assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())
    found = events(folder, "evaluation")
    assert [(event["step"], event["weights"]) for event in found] == [(4, "last"), (8, "mean of 4"), (12, "mean of 8")]
    results = json.loads((folder / "results.json").read_text())["protocols"]
    accuracies = {name: result["accuracy"] for name, result in results.items()}
    final = {name: {w: a[w]["top-1"][0] for w in ("CLIP*", "0", "0.5", "1")} for name, a in accuracies.items()}
    assert found[-1]["accuracy"] == final
    assert found[0]["accuracy"] != final
    assert found[-1]["value"] == (final["closed"]["0.5"] + final["zs_object"]["0.5"]) / 2
    assert {"tensorboard", "trace.json.gz"} <= {path.name for path in folder.iterdir()}
    assert not (folder / "logits" / "in-training").exists()
