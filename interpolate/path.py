"""What a model is worth along the path from theta to the anchor, and which models to mix."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

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
        alone = [_value(evaluate(uniform_soup([source])), name) for source, name in zip(opened, names, strict=True)]
        first, *others = sorted(range(len(sources)), key=lambda i: -alone[i])
        chosen, best = [first], alone[first]
        soup = _GrowingMean(opened[first], buffer_names(opened, ThetaOnly((), weights_of(opened[first]))))
        for i in others:
            candidate = soup.renamed(opened[i])
            value = _value(evaluate(soup.mean_with(candidate)), f"the mean with {names[i]}")
            if value >= best:
                soup.add(candidate)
                chosen, best = [*chosen, i], value
    return chosen, best


def _value(given: Any, of: str) -> float:
    try:
        value = float(given)
    except (TypeError, ValueError):
        value = math.nan
    if math.isnan(value):
        raise ValueError(f"evaluate must give a number, and gave {given!r} for {of}.")
    return value


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
