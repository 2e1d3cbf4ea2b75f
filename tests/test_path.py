from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_modules import identical, modules, moved, snapshot
from torch import nn

from interpolate import WeightMismatchError, evaluate_path, greedy_soup, patch, uniform_soup
from interpolate.checkpoints import Checkpoint
from interpolate.path import PathValues
from interpolate.weights import trainable_weights


def scalar(value: float) -> nn.Module:
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(model.weight, value)
    return model


ANCHOR = {"weight": torch.zeros(1, 1, dtype=torch.float64)}


@given(modules(), st.lists(st.floats(0, 1), min_size=1, max_size=4))
def test_the_path_is_made_of_patched_weights_and_leaves_the_model_as_it_was(
    model: nn.Module, anchor_weights: list[float]
):
    anchor, own = trainable_weights(moved(model)), snapshot(model)
    theta = {n: p.detach().clone() for n, p in trainable_weights(model).items()}
    seen = []
    evaluate_path(
        model,
        anchor,
        lambda m: seen.append({n: p.detach().clone() for n, p in trainable_weights(m).items()}) or 0.0,
        anchor_weights=anchor_weights,
    )
    assert identical(snapshot(model), own)
    for weight, weights in zip(anchor_weights, seen, strict=True):
        assert identical(weights, patch(anchor, theta, anchor_weight=weight))


def test_weights_come_back_after_an_exception_on_the_path():
    model = scalar(2.0)
    with pytest.raises(ZeroDivisionError):
        evaluate_path(model, ANCHOR, lambda _: 1 / 0)
    assert model.weight.item() == 2


def test_theta_may_be_given():
    theta = {"weight": torch.full((1, 1), 8.0).double()}
    found = evaluate_path(scalar(1.0), ANCHOR, lambda m: m.weight.item(), anchor_weights=(0, 0.25), theta=theta)
    assert found == PathValues((0.0, 0.25), (8.0, 6.0))


def test_every_anchor_weight_is_checked_before_the_first_evaluation():
    with pytest.raises(ValueError, match=r"anchor_weights .* got 1\.5"):
        evaluate_path(scalar(1.0), ANCHOR, lambda _: pytest.fail("evaluated"), anchor_weights=(0, 1.5))


@given(st.floats(-5, 5), st.floats(-5, 5))
def test_a_straight_line_has_no_barrier(start: float, end: float):
    weights = (0.0, 0.25, 1.0)
    line = PathValues(weights, tuple((1 - w) * start + w * end for w in weights))
    assert line.barrier() == pytest.approx(0, abs=1e-12)


def test_a_barrier_needs_both_ends():
    with pytest.raises(ValueError, match=r"needs the values at 0 and 1, got anchor_weights \(0\.0, 0\.5\)"):
        PathValues((0.0, 0.5), (1.0, 1.0)).barrier()


def closeness_to(target: float):
    return lambda weights: -abs(weights["w"].item() - target)


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=6))
def test_a_greedy_soup_is_never_worse_than_its_best_ingredient(values: list[float]):
    sources = [{"w": torch.tensor([value])} for value in values]
    chosen, best = greedy_soup(sources, closeness_to(1.0))
    assert best >= max(closeness_to(1.0)(source) for source in sources)
    assert best == closeness_to(1.0)(uniform_soup([sources[i] for i in chosen]))


def test_a_soup_of_nothing_or_of_nan_is_refused():
    with pytest.raises(ValueError, match="at least one source"):
        greedy_soup([], closeness_to(1.0))
    sources = [{"w": torch.ones(1)}, {"w": torch.zeros(1)}]
    with pytest.raises(ValueError, match="nan for source 1"):
        greedy_soup(sources, lambda w: w["w"].item() or float("nan"))
    with pytest.raises(ValueError, match="nan for the mean with source 1"):
        greedy_soup(sources, lambda w: float("nan") if w["w"] == 0.5 else w["w"].item())
    with pytest.raises(ValueError, match="must give a number, and gave None for source 0"):
        greedy_soup(sources, lambda w: None)


def test_a_soup_of_modules_and_files_is_their_mean(tmp_path: Path):
    modules = [nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)) for _ in range(3)]
    for module in modules:
        module.register_buffer("scale", torch.randn(1))
    paths = [tmp_path / f"{i}.pt" for i in range(3)]
    for module, path in zip(modules, paths, strict=True):
        torch.save(module.state_dict(), path)
    for sources in (modules, paths):
        means = []
        chosen, _ = greedy_soup(sources, lambda weights, means=means: means.append(weights) or float(len(means)))
        assert chosen == [2, 1, 0]
        assert identical(means[-1], uniform_soup([sources[i] for i in chosen]))


def test_a_soup_opens_every_file_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    paths = [tmp_path / f"{i}.pt" for i in range(6)]
    for i, path in enumerate(paths):
        torch.save({"w": torch.tensor([float(i)])}, path)
    opened, make = [], Checkpoint.__init__
    monkeypatch.setattr(Checkpoint, "__init__", lambda self, path: opened.append(path) or make(self, path))
    assert greedy_soup(paths, closeness_to(2.5)) == ([2, 3], 0.0)
    assert opened == paths


def test_what_can_not_be_averaged_is_found_before_the_first_evaluation():
    sources = [{"w": torch.ones(1)}, {"v": torch.ones(1)}]
    with pytest.raises(WeightMismatchError, match="source 1 does not match source 0"):
        greedy_soup(sources, lambda _: pytest.fail("evaluated"))


def test_a_mask_of_infinities_goes_through_a_soup():
    sources = [{"mask": torch.tensor([0.0, -torch.inf]), "w": torch.tensor([value])} for value in (1.0, 3.0, 5.0)]
    means = []
    greedy_soup(sources, lambda weights: means.append(weights) or 0.0)
    assert means[-1]["mask"].tolist() == [0.0, -torch.inf]
    assert means[-1]["w"].item() == 3


def test_the_path_goes_on_beyond_its_ends_where_it_is_asked_to():
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(model.weight, 2.0)
    found = evaluate_path(
        model,
        {"weight": torch.ones(1, 1).double()},
        lambda model: model.weight.item(),
        anchor_weights=(-0.5, 1.5),
        extrapolate=True,
    )
    assert found.values == (2.5, 0.5)
    assert model.weight.item() == 2
