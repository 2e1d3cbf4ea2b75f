"""The path from theta to the anchor: what a model is worth along it, where to stop on it, and which models to mix."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from interpolate._names import renamed
from interpolate._operations import checked, is_mixed, summed, without_extra_state
from interpolate._theta_only import ThetaOnly
from interpolate.checkpoints import Checkpoint
from interpolate.patching import Source, buffer_names, matched, patch, uniform_soup, weights_of
from interpolate.weights import Weights, applied, check_coefficient, trainable_weights

Evaluate = Callable[[nn.Module], float]


@dataclass(frozen=True)
class PathValues:
    """What a function of the model gives along the path; index 0 is the first of `anchor_weights`."""

    anchor_weights: tuple[float, ...]
    values: tuple[float, ...]

    def barrier(self) -> float:
        """How far a loss rises above the straight line between its ends: `max L(w) - ((1 - w) L(0) + w L(1))`.

        Not negative; 0 means that theta and the anchor are linearly connected as far as was evaluated.

        Source: Frankle et al. 2020 (arXiv 1912.05671), with the line of Entezari et al. 2022.

        Raises:
            ValueError: The ends, 0 and 1, were not evaluated.

        Example:
            >>> PathValues((0.0, 0.5, 1.0), (1.0, 3.0, 2.0)).barrier()
            1.5
        """
        loss = dict(zip(self.anchor_weights, self.values, strict=True))
        if 0 not in loss or 1 not in loss:
            raise ValueError(f"a barrier needs the values at 0 and 1, got anchor_weights {self.anchor_weights}.")
        return max(value - ((1 - w) * loss[0] + w * loss[1]) for w, value in loss.items())

    def plot(self, file: str, label: str = "value") -> None:
        """Draw the values over the weight of the anchor into an image file; needs matplotlib."""
        from matplotlib.figure import Figure  # optional

        figure = Figure(figsize=(5, 3.5), layout="constrained")
        axes = figure.subplots()
        axes.plot(self.anchor_weights, self.values, marker="o")
        axes.set(xlabel="weight of the anchor (0: theta, 1: anchor)", ylabel=label)
        figure.savefig(file)


def evaluate_path(
    model: nn.Module,
    anchor: Weights,
    evaluate: Evaluate,
    *,
    anchor_weights: Sequence[float] = tuple(i / 10 for i in range(11)),
    theta: Weights | None = None,
    extrapolate: bool = False,
    theta_only: Sequence[str] = (),
) -> PathValues:
    """Evaluate a model at weights along the path from theta to the anchor; its own come back whatever happens.

    Args:
        model: Evaluated with the mixed weights in place of its own. BatchNorm statistics are the model's: call
            `reestimate_batchnorm` in `evaluate` if it has any.
        anchor: The pretrained weights by name, such as `regularizer.anchor`.
        evaluate: Called with the model once for each weight of the anchor.
        anchor_weights: In [0, 1], or any finite numbers with `extrapolate`.
        theta_only: As for `patch`.
        theta: The fine-tuned weights by name, such as `averager.weights`; by default those of the model.

    Raises:
        WeightMismatchError: `anchor` and `theta` do not match.
        ValueError: An anchor weight is out of its range.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.constant_(model.weight, 2.0)
        >>> anchor = {"weight": torch.zeros(1, 1)}
        >>> evaluate_path(model, anchor, lambda model: model(torch.ones(1)).item(), anchor_weights=(0, 0.5, 1)).values
        (2.0, 1.0, 0.0)
    """
    for weight in anchor_weights:
        check_coefficient("anchor_weights", weight, extrapolate=extrapolate)
    source = trainable_weights(model) if theta is None else theta
    theta = {name: tensor.detach().clone() for name, tensor in source.items()}
    values = []
    for weight in anchor_weights:
        mixed = patch(anchor, theta, anchor_weight=weight, extrapolate=extrapolate, theta_only=theta_only)
        with applied(model, mixed):
            values.append(float(evaluate(model)))
    return PathValues(tuple(map(float, anchor_weights)), tuple(values))


@dataclass(frozen=True)
class ChosenWeight:
    """An anchor weight together with the data that it was chosen on."""

    anchor_weight: float
    value: float
    data: str
    evaluated: PathValues

    def to_report_on(self, data: str) -> float:
        """The anchor weight, for a score on other data than it was chosen on.

        Raises:
            ValueError: It is the same data: a score on it would be too good.
        """
        if data == self.data:
            raise ValueError(
                f"anchor_weight {self.anchor_weight:.4g} was chosen on {self.data!r}; a score on the same data would "
                "be too good. Report on data that was held out from the choice."
            )
        return self.anchor_weight


def choose_anchor_weight(
    model: nn.Module,
    anchor: Weights,
    evaluate: Evaluate,
    *,
    data: str,
    method: Literal["grid", "golden"] = "grid",
    points: int = 11,
    theta: Weights | None = None,
    theta_only: Sequence[str] = (),
) -> ChosenWeight:
    """Search the weight of the anchor with the highest value of `evaluate` on held-out data.

    Args:
        model: As for `evaluate_path`, and so are `anchor`, `evaluate`, `theta` and `theta_only`; higher values are
            better.
        data: Name of the data that `evaluate` uses, for the record and for `ChosenWeight.to_report_on`.
        method: `"grid"` evaluates equally spaced weights, ends included. `"golden"` narrows the range by golden
            section, which finds the maximum only if there is a single one.
        points: How many evaluations, at least 2.

    Raises:
        ValueError: An argument is out of its range, or all values are nan.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.constant_(model.weight, 1.0)
        >>> anchor = {"weight": torch.zeros(1, 1)}
        >>> chosen = choose_anchor_weight(model, anchor, lambda m: -abs(m.weight.item() - 0.7), data="dev split")
        >>> chosen.to_report_on("test split")
        0.3
    """
    if not data:
        raise ValueError("data must name the held-out data that evaluate uses, got ''.")
    if points < 2:
        raise ValueError(f"points must be at least 2, got {points}.")
    theta = trainable_weights(model) if theta is None else theta

    def value(*weights: float) -> tuple[float, ...]:
        path = evaluate_path(model, anchor, evaluate, anchor_weights=weights, theta=theta, theta_only=theta_only)
        return path.values

    if method == "grid":
        weights = tuple(i / (points - 1) for i in range(points))
        found = dict(zip(weights, value(*weights), strict=True))
    elif method == "golden":
        found = _golden_section(lambda weight: value(weight)[0], points)
    else:
        raise ValueError(f"method must be 'grid' or 'golden', got {method!r}.")
    comparable = {w: v for w, v in found.items() if v == v}
    if not comparable:
        raise ValueError(f"evaluate gave nan at every anchor weight ({', '.join(f'{w:.3g}' for w in found)}).")
    best = max(comparable, key=lambda w: comparable[w])
    order = sorted(found)
    return ChosenWeight(best, found[best], data, PathValues(tuple(order), tuple(found[w] for w in order)))


def _golden_section(value: Callable[[float], float], points: int) -> dict[float, float]:
    """The evaluated points of a search for the maximum over [0, 1]. Source: Kiefer 1953."""
    ratio = (5**0.5 - 1) / 2
    low, high = 0.0, 1.0
    left, right = high - ratio * (high - low), low + ratio * (high - low)
    found = {left: value(left), right: value(right)}
    while len(found) < points:
        if found[left] >= found[right]:
            high, right = right, left
            left = high - ratio * (high - low)
            found[left] = value(left)
        else:
            low, left = left, right
            right = low + ratio * (high - low)
            found[right] = value(right)
    return found


def greedy_soup(sources: Sequence[Source], evaluate: Callable[[dict[str, Tensor]], float]) -> tuple[list[int], float]:
    """Which of several sets of weights to average: from the best on, each is kept if the mean gets no worse with it.

    A checkpoint is opened once and read twice, alone and when its turn comes. In memory are then the sum of the chosen
    ones in float64, the one whose turn it is, and their mean: four times the weights in float32.

    Source: Wortsman et al. 2022 (arXiv 2203.05482), recipe 1.

    Args:
        sources: State dicts, modules or checkpoint paths.
        evaluate: The value of a set of weights on held-out data; higher is better.

    Returns:
        The indices of the chosen sources, best first, and the value of their mean, which `uniform_soup` makes.

    Raises:
        ValueError: There is no source, a value is nan, or a mean is not finite.
        WeightMismatchError, ValueError: They can't be averaged; found before the first is evaluated.

    Example:
        >>> import torch
        >>> sources = [{"w": torch.tensor([value])} for value in (3.0, 0.0, 9.0)]
        >>> greedy_soup(sources, lambda weights: -abs(weights["w"].item() - 2))
        ([0, 1], -0.5)
    """
    if not sources:
        raise ValueError("a soup needs at least one source, got none.")
    names = [os.fspath(s) if isinstance(s, (str, os.PathLike)) else f"source {i}" for i, s in enumerate(sources)]
    with ExitStack() as stack:
        opened = [stack.enter_context(Checkpoint(s)) if isinstance(s, (str, os.PathLike)) else s for s in sources]
        matched([without_extra_state(s.entries) if isinstance(s, Checkpoint) else weights_of(s) for s in opened], names)
        alone = [float(evaluate(uniform_soup([source]))) for source in opened]
        if any(map(math.isnan, alone)):
            raise ValueError(f"evaluate gave nan for {names[[*map(math.isnan, alone)].index(True)]}.")
        first, *others = sorted(range(len(sources)), key=lambda i: -alone[i])
        chosen, best = [first], alone[first]
        soup = _GrowingMean(opened[first], buffer_names(opened, ThetaOnly((), weights_of(opened[first]))))
        for i in others:
            candidate = soup.renamed(opened[i])
            value = float(evaluate(soup.mean_with(candidate)))
            if value >= best:
                soup.add(candidate)
                chosen, best = [*chosen, i], value
    return chosen, best


class _GrowingMean:
    """What `uniform_soup` gives for sources that come one after the other, without reading again those that it has."""

    def __init__(self, first: Source, kept: Collection[str]) -> None:
        weights = weights_of(first)
        self.n = 1
        self.dtypes = {n: t.dtype for n, t in weights.items() if is_mixed(n, t.dtype) and n not in kept}
        self.sums = {name: summed([weights[name]]) for name in self.dtypes}
        self.rest = {name: tensor.detach() for name, tensor in weights.items() if name not in self.dtypes}

    def renamed(self, source: Source) -> Weights:
        """A source's weights by the names of the first one."""
        weights = weights_of(source)
        names = renamed(weights, {**self.sums, **self.rest})
        return {names[name]: tensor for name, tensor in weights.items()}

    def mean_with(self, weights: Weights) -> dict[str, Tensor]:
        mean = {name: tensor.clone() for name, tensor in self.rest.items()}
        for name, dtype in self.dtypes.items():
            total, tensor = self.sums[name], weights[name]
            mixed = (summed([total, tensor]) / (self.n + 1)).to(dtype)
            mean[name] = checked(name, mixed, [(total / self.n).to(dtype), tensor])
        return mean

    def add(self, weights: Weights) -> None:
        self.n += 1
        for name, total in self.sums.items():
            self.sums[name] = summed([total, weights[name]])
