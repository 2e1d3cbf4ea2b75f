from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from interpolate import choose, patch, repair
from interpolate.checkpoints import Checkpoint
from interpolate.choosing import Judging, check_held_out
from interpolate.errors import WeightMismatchError
from interpolate.inspection import verify
from interpolate.kernels import parse_kernel
from interpolate.patching import mix


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def saved(name: str, seed: int, **others: torch.Tensor) -> str:
    torch.manual_seed(seed)
    names = ("visual.h.0.fc.w", "visual.h.1.fc.w", "visual.h.2.fc.w", "text.w", "head.w")
    Path(name).parent.mkdir(exist_ok=True)
    save_file({**{n: torch.randn(3) for n in names}, "n": torch.tensor(seed), **others}, name)
    return name


def course(n: int) -> list[str]:
    return [saved(f"run/step-{i}.safetensors", i) for i in range(1, n + 1)]


def test_every_kernel_and_anchor_weight_is_judged_at_its_own_weights_and_the_best_is_written():
    paths, anchor = course(5), saved("anchor.safetensors", 9)
    seen: list[dict[str, torch.Tensor]] = []

    def evaluate(weights: dict[str, torch.Tensor]) -> float:
        seen.append(weights)
        return -abs(len(seen) - 5.0)

    kernels, ratios = ("uniform", "power:0.1"), (0.0, 0.5, 1.0)
    choice = choose("run", evaluate, data="dev", anchor=anchor, kernels=kernels, anchor_weights=ratios)
    assert [tuple(c.settings.values()) for c in choice.candidates] == [(k, r) for k in kernels for r in ratios]
    for (kernel, ratio), weights in zip(((k, r) for k in kernels for r in ratios), seen, strict=True):
        shares = parse_kernel(kernel).weights(5).tolist()
        mean = mix(paths[::-1], {"operation": "average", "weights": shares[::-1]})
        torch.testing.assert_close(weights, patch(anchor, mean, anchor_weight=ratio), rtol=1e-6, atol=1e-6)
        assert weights["n"].item() == 5  # the latest snapshot's
    assert choice.best == 4
    choice.write("out.safetensors")
    written = load_file("out.safetensors")
    assert all(torch.equal(written[name], tensor) for name, tensor in seen[4].items())
    assert verify("out.safetensors") == []


def test_what_only_the_snapshots_have_is_averaged_alone():
    """A head and rows of a vocabulary; the anchor has another head of that name, and fewer rows in half precision."""
    paths = [
        saved(
            f"run/step-{i}.safetensors",
            i,
            half=torch.randn(64).bfloat16(),
            **{"new.w": torch.randn(4), "embed.w": torch.randn(5, 2)},
        )
        for i in (1, 2)
    ]
    of_anchor = {"new.w": torch.randn(7), "embed.w": torch.randn(3, 2).bfloat16(), "half": torch.randn(64).bfloat16()}
    anchor = saved("anchor.safetensors", 9, **of_anchor)
    with pytest.raises(WeightMismatchError, match=r"new\.w"):
        choose("run", lambda _: 0.0, data="dev", anchor=anchor)
    with pytest.raises(ValueError, match="without an anchor"):
        choose("run", lambda _: 0.0, data="dev", theta_only=["new.*"])
    seen: list[dict[str, torch.Tensor]] = []
    choice = choose(
        "run",
        lambda weights: seen.append(weights) or float(len(seen) == 2),
        data="dev",
        anchor=anchor,
        kernels=["exponential:1"],
        anchor_weights=[0.0, 0.3, 1.0],
        theta_only=["new.*", "embed.w[3:]"],
    )
    (first, second), pretrained = (load_file(path) for path in paths), load_file(anchor)
    for ratio, weights in zip((0.0, 0.3, 1.0), seen, strict=True):
        for name, tensor in weights.items():
            if tensor.is_floating_point():
                mean = (first[name].double() + 2 * second[name].double()) / 3
                expected = mean.clone()
                if name == "embed.w":
                    expected[:3] = (1 - ratio) * mean[:3] + ratio * pretrained[name].double()
                elif name != "new.w":
                    expected = (1 - ratio) * mean + ratio * pretrained[name].double()
                torch.testing.assert_close(tensor, expected.to(tensor.dtype))
    choice.write("out.safetensors")
    written = load_file("out.safetensors")
    assert all(torch.equal(written[name], tensor) for name, tensor in seen[1].items())
    assert verify("out.safetensors") == []


def test_every_snapshot_is_opened_once_for_its_values(monkeypatch: pytest.MonkeyPatch):
    course(3)
    read, chunks = [], Checkpoint.chunks
    monkeypatch.setattr(Checkpoint, "chunks", lambda self, name: read.append((self.path, name)) or chunks(self, name))
    choose("run", lambda _: 0.0, data="dev", kernels=("uniform", "power:0.1", "power:0.2"))
    assert len(read) == len(set(read)) == 3 * 5 + 1  # what is not averaged is read from the latest alone


def test_a_mask_of_infinities_and_half_precision_go_through():
    mask = torch.tensor([0.0, -torch.inf])
    for i in (1, 2):
        saved(f"run/step-{i}.safetensors", i, mask=mask, half=torch.ones(2).bfloat16() * i)
    anchor = saved("anchor.safetensors", 9, mask=mask, half=torch.zeros(2).bfloat16())
    seen: list[dict[str, torch.Tensor]] = []
    choose("run", lambda w: seen.append(w) or 0.0, data="dev", anchor=anchor, kernels=["uniform"], anchor_weights=[0.5])
    assert seen[0]["mask"].tolist() == mask.tolist()
    assert (seen[0]["half"].dtype, seen[0]["half"].tolist()) == (torch.bfloat16, [0.75, 0.75])


def judged(scores: list[object], metrics: tuple[str, ...] = ()):
    values = iter(scores)
    judging = Judging(lambda _: next(values), "dev", metrics)
    for i in range(len(scores)):
        judging.judge({"anchor_weight": float(i)}, {}, {})
    return judging.choice([])


def test_intervals_are_those_of_the_mean_and_tell_what_is_as_good():
    torch.manual_seed(0)
    right = (torch.rand(2000) < 0.7).float()
    nearly, worse = right.clone(), right.clone()
    nearly[:3] = 0.0
    worse[:300] = 0.0
    choice = judged([worse, right, nearly])
    assert choice.best == 1
    assert choice.as_good == [2] or right[:3].sum() > 2
    ends = choice.chosen.intervals["value"]
    assert ends is not None
    assert ends[1] - ends[0] == pytest.approx(2 * 1.96 * (0.7 * 0.3 / 2000) ** 0.5, rel=0.15)
    assert ends[0] < choice.chosen.value < ends[1]


def test_numbers_have_no_intervals_and_nan_is_never_chosen():
    choice = judged([1.0, float("nan"), 3.0])
    assert (choice.best, choice.as_good, choice.chosen.intervals) == (2, [], {"value": None})
    with pytest.raises(ValueError, match="nan for all of 2 candidates"):
        judged([float("nan")] * 2)


def test_the_front_holds_what_no_other_is_better_than():
    pairs = [(1.0, 0.0), (0.5, 0.5), (0.4, 0.4), (0.0, 1.0), (0.9, 0.6)]
    choice = judged([{"new": new, "kept": kept} for new, kept in pairs], ("new", "kept"))
    assert choice.front == [0, 3, 4]
    assert choice.best == 4
    assert choice.chosen.value == pytest.approx(0.75)


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (["high"], "a number, or one for each example, got 'high'"),
        ([[]], r"got the shape \(0,\)"),
        ([[[1.0]]], r"got the shape \(1, 1\)"),
        ([[1.0, 0.0], [1.0]], "the same examples always; value had 2, then 1"),
        ([{}], "must give the metrics"),
    ],
)
def test_what_is_no_metric_is_said(scores: list[object], message: str):
    with pytest.raises(ValueError, match=message):
        judged(scores)


@pytest.mark.parametrize("name", ["test", "ucf101/test split", "k400-test", "onTest", "TEST_accuracy"])
def test_nothing_is_chosen_on_a_test_set(name: str):
    with pytest.raises(ValueError, match="is that of a test set"):
        check_held_out("data", name)
    with pytest.raises(ValueError, match="is that of a test set"):
        repair("a", "b", lambda _: pytest.fail("evaluated"), data=name)


def test_a_choice_is_not_reported_on_its_own_data():
    choice = judged([1.0])
    choice.check_report_on("another split")
    with pytest.raises(ValueError, match=r"was chosen on 'dev'; a score on the same data"):
        choice.check_report_on("dev")
    for name in ("dev", "contest", "latest", "validation"):
        check_held_out("data", name)


def test_a_repair_finds_the_group_that_forgot():
    anchor, theta = saved("anchor.safetensors", 0), saved("theta.safetensors", 1)
    old, new = load_file(anchor), load_file(theta)

    def evaluate(weights: dict[str, torch.Tensor]) -> dict[str, float]:
        gain = sum(-(weights[n] - new[n]).norm().item() for n in new if n.startswith(("visual", "head")))
        return {"new": gain, "kept": -3 * (weights["text.w"] - old["text.w"]).norm().item()}

    choice = repair(anchor, theta, evaluate, data="dev", points=5)
    assert {c.settings["how"] for c in choice.candidates} == {"patch", "by depth", "by group"}
    assert choice.chosen.values == {"new": 0.0, "kept": 0.0}
    assert choice.chosen.settings["anchor_weight"]["text.*"] == 1.0
    choice.write("out.safetensors")
    assert torch.equal(load_file("out.safetensors")["text.w"], old["text.w"])
    assert torch.equal(load_file("out.safetensors")["head.w"], new["head.w"])
    assert verify("out.safetensors") == []
    assert "chosen on dev" in str(choice)


def test_names_that_show_neither_depth_nor_groups_are_tried_as_a_whole_and_it_is_said():
    for seed, name in enumerate(("a.safetensors", "b.safetensors")):
        save_file({"w": torch.full((1,), float(seed))}, name)
    choice = repair(
        "a.safetensors", "b.safetensors", lambda w: {"new": 0.0, "kept": w["w"].item()}, data="dev", points=3
    )
    assert [c.settings["how"] for c in choice.candidates] == ["patch"] * 3
    assert choice.notes[0].startswith("not tried by depth: no depth is to be seen")
    assert choice.notes[1] == "not tried by group: all names begin alike."


def test_what_evaluate_raises_is_its_own():
    anchor, theta = saved("anchor.safetensors", 0), saved("theta.safetensors", 1)
    calls = []

    def evaluate(_: object) -> dict[str, float]:
        calls.append(0)
        if len(calls) > 5:
            raise ValueError("mine")
        return {"new": 0.0, "kept": 0.0}

    with pytest.raises(ValueError, match="mine"):
        repair(anchor, theta, evaluate, data="dev", points=5)


def test_a_new_head_stays_thetas_own_in_a_repair():
    anchor, theta = saved("anchor.safetensors", 0), saved("theta.safetensors", 1, classifier=torch.ones(2))
    seen: list[dict[str, torch.Tensor]] = []
    worth = lambda weights: seen.append(weights) or {"new": 0.0, "kept": float(len(seen))}  # noqa: E731 # short
    choice = repair(anchor, theta, worth, data="dev", points=2, theta_only=["classifier"])
    assert all(weights["classifier"].tolist() == [1.0, 1.0] for weights in seen)
    choice.write("out.safetensors")
    assert verify("out.safetensors") == []
