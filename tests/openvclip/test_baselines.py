"""The paper's baselines, and its recipes."""

import copy
import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from applications.openvclip import train
from applications.openvclip.commands.train import parse
from applications.openvclip.recipes import RECIPES
from applications.openvclip.runs.journal import read_journal
from applications.openvclip.runs.weights import load_weights
from applications.openvclip.training.l2_penalty import L2Penalty
from applications.openvclip.training.teacher import Teacher
from applications.openvclip.training_run import regularizer
from interpolate import load_weights as load_into
from tests.openvclip.steps import Plan, Scorer, small_batches, small_step
from tests.openvclip.test_commands import arguments


def test_the_l2_penalty_has_the_gradient_of_its_formula() -> None:
    torch.manual_seed(0)
    model = Scorer()
    penalty = L2Penalty(model, strength=0.7)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))
    x = torch.randn(5, 3, 2, 2, 2)
    with penalty.one_step():
        loss = penalty.backward(lambda model: model(x, torch.eye(4)).square().mean(), index=0)
    found = [p.grad.clone() for p in model.parameters()]
    distance = sum(((p - penalty.anchor[name]) ** 2).sum() for name, p in model.named_parameters())
    plain = model(x, torch.eye(4)).square().mean()
    expected = torch.autograd.grad(plain + 0.5 * 0.7 * distance, list(model.parameters()))
    assert torch.equal(loss, plain)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    with pytest.raises(ValueError, match="not negative, got -1"):
        L2Penalty(model, strength=-1)


def test_the_loss_with_a_teacher_weighs_its_answers_and_the_labels() -> None:
    torch.manual_seed(0)
    model = Scorer()
    anchor = copy.deepcopy(model)
    teacher = Teacher(model, weight=0.3, decay=0.9)
    x, labels, classes = torch.randn(5, 3, 2, 2, 2), torch.tensor([0, 3, 1, 1, 2]), torch.eye(4)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))
    teacher.update()
    theta = dict(model.named_parameters())
    average = {name: 0.9 * p + 0.1 * theta[name] for name, p in anchor.named_parameters()}
    at_average = copy.deepcopy(model)
    load_into(at_average, average)
    logits = model(x, classes)
    found = F.cross_entropy(logits, teacher.target(labels, lambda model: model(x, classes)))
    answers = at_average(x, classes).softmax(-1).detach()
    distillation = -(answers * logits.log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(found, 0.3 * distillation + 0.7 * F.cross_entropy(logits, labels))
    with pytest.raises(ValueError, match=r"in \[0, 1\], got 1.5"):
        Teacher(model, weight=1.5, decay=0.9)


def test_a_student_that_only_learns_from_its_teacher_stays_where_it_is() -> None:
    step = replace(small_step(Plan(taught=True)), learning_rate=lambda _: 0.1)
    step.teacher.weight = 1.0
    values, _ = step(small_batches(step.order))
    assert values["gradient_norm"] < 1e-6  # the teacher is the student still
    assert step.teacher.average.n_averaged == 2


def test_the_first_step_with_a_teacher_is_the_share_of_the_labels_and_training_goes_on_from_there() -> None:
    taught, plain = (small_step(Plan(taught=taught)) for taught in (True, False))
    batches = list(itertools.islice(small_batches(taught.order), taught.order.micro_batches))
    taken = [taught(iter(batches))[0] for _ in range(6)]
    assert taken[0]["gradient_norm"] == pytest.approx(0.5 * plain(iter(batches))[0]["gradient_norm"], rel=1e-5)
    assert taken[-1]["loss"] < taken[0]["loss"]
    assert taught.teacher.average.n_averaged == 7


def test_a_teacher_may_be_the_mean_of_the_anchor_and_every_step() -> None:
    torch.manual_seed(0)
    model = Scorer()
    seen = [copy.deepcopy(model)]
    teacher = Teacher(model, weight=1.0, decay=None)
    for _ in range(2):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
        teacher.update()
        seen.append(copy.deepcopy(model))
    mean = copy.deepcopy(model)
    load_into(mean, {n: sum(dict(m.named_parameters())[n] for m in seen) / 3 for n, _ in model.named_parameters()})
    x, classes = torch.randn(5, 3, 2, 2, 2), torch.eye(4)
    found = teacher.target(torch.zeros(5, dtype=torch.long), lambda model: model(x, classes))
    torch.testing.assert_close(found, mean(x, classes).softmax(-1))


@pytest.mark.parametrize("every", [1, 2, 3])
def test_a_regularizer_of_every_nth_step_is_n_times_as_strong_in_it(every: int) -> None:
    thinned, plain, strong = (small_step(Plan(learning_rate=0.0)) for _ in range(3))
    thinned = replace(thinned, every=every)
    plain.regularizer.strength, strong.regularizer.strength = 0.0, every * 0.5
    plain, strong = replace(plain), replace(strong)
    of_all = [small_batches(step.order) for step in (thinned, plain, strong)]
    for taken in range(6):
        values, without, with_strength = (step(b)[0] for step, b in zip((thinned, plain, strong), of_all, strict=True))
        expected = without if taken % every else with_strength
        assert values["gradient_norm"] == expected["gradient_norm"]
        assert ("interpolated_loss" in values) == (taken % every == 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "averaged", "interpolated"),
    [
        ("fine-tuning", False, False),
        ("iwr", False, True),
        ("swa", True, False),
        ("l2", True, False),
        ("teacher", True, False),
        ("open-vclip+teacher", True, True),
    ],
)
def test_each_baseline_trains_with_its_parts_alone(
    small_world: dict[str, Path], tmp_path: Path, method: str, averaged: bool, interpolated: bool
) -> None:
    train.main(arguments(small_world, tmp_path, "--method", method, "--optimization.epochs", "2"))
    weights, metadata = load_weights(tmp_path / "averaged.safetensors")  # of the whole CLIP
    last, _ = load_weights(tmp_path / "last.safetensors")
    assert all(torch.equal(weights[name], tensor) for name, tensor in last.items()) != averaged
    assert (metadata["content"] == "mean of 1 fine-tuned weights") != averaged
    steps = [event for event in read_journal(tmp_path / "journal.jsonl") if event["event"] == "step"]
    assert all(("interpolated_loss" in step) == interpolated for step in steps)
    assert any(step["alpha"] > 0 for step in steps) == interpolated


@pytest.mark.parametrize(("name", "anchor_weight"), [("vit_b_32", 0.5), ("vit_b_16", 0.5), ("vit_l_14", 0.6)])
def test_the_recipes_have_the_published_settings(name: str, anchor_weight: float) -> None:
    config = parse([name])
    assert config == RECIPES[name]()
    o, s = config.optimization, config.sampling
    assert (o.epochs, o.batch_size, o.warmup_epochs, o.schedule) == (22, 64, 2, "cosine")
    assert (o.learning_rate, o.lowest_learning_rate, o.weight_decay, o.max_gradient_norm) == (3.33e-6, 3.33e-8, 0.01, 1)
    assert (s.frames, s.stride, s.target_fps, s.views) == (8, 16, 30, 3)
    assert round(config.augmentation.max_short_side * 224) == 256
    assert (config.regularizer.max_alpha, config.regularizer.strength) == (0.6, 0.5)
    assert config.evaluation.anchor_weight == anchor_weight
    assert config.model.pretrained == "openai"
    assert "quickgelu" in config.model.name
    assert f"train {name} " in (RECIPES[name].__doc__ or "")


def test_a_recipe_on_real_data_needs_videos(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--data\.train: ViT-B-16-quickgelu needs videos to train on"):
        train.main(["vit_b_16", "--output", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("passes", ["split", "random"])
def test_one_pass_for_both_terms_is_what_the_library_computes_with_the_clips(passes: str) -> None:
    plan = Plan(micro_batch=8, clips_at_once=8)
    step, alone = small_step(plan), small_step(plan)
    config = RECIPES["miniature"]()
    config = replace(config, regularizer=replace(config.regularizer, passes=passes))
    step.regularizer, expected = (regularizer("iwr", s.model, config) for s in (step, alone))
    (batch,) = itertools.islice(small_batches(step.order), 1)
    with expected.one_step():
        expected.backward(
            lambda model, clips, labels: F.cross_entropy(model(clips, alone.class_embeddings), labels),
            batch.clips,
            batch.labels,
            index=0,
        )
    assert expected.passes == passes
    step.max_gradient_norm = float("inf")
    step(iter([batch]))
    for found, p in zip(step.encoder.parameters(), alone.encoder.parameters(), strict=True):
        torch.testing.assert_close(found.grad, p.grad)
