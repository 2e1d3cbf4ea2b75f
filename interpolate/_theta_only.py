"""Parts of theta that the anchor does not have, as whoever added them says: a new head, tokens of a vocabulary."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, TypeVar

import torch
from torch import Tensor

from interpolate._names import prefix_before, renamed
from interpolate.errors import WeightMismatchError
from interpolate.weights import listed, mixing_precision

T = TypeVar("T")

_ROWS = re.compile(r"(?P<pattern>.+)\[(?P<first>\d+):\]")


class ThetaOnly:
    """What patterns such as `"head.*"` and `"embed.weight[32000:]"` (its rows from 32000 on) mean for theta's names.

    Raises:
        ValueError: A pattern fits no name.
    """

    def __init__(self, patterns: Sequence[str], theta: Collection[str]) -> None:
        if isinstance(patterns, str):
            raise ValueError(f"theta_only is a list of patterns, got the text {patterns!r}.")
        self._theta = theta
        self._patterns = [pattern for pattern in patterns if not _ROWS.fullmatch(pattern)]
        self.own: set[str] = set()
        """Names of tensors that are theta's as a whole, whatever the anchor may have of these names."""
        self.rows: dict[str, int] = {}
        """Names of tensors of which the anchor has this many rows, and theta more."""
        for pattern in patterns:
            rows = _ROWS.fullmatch(pattern)
            fitting = {name for name in theta if fnmatchcase(name, rows["pattern"] if rows else pattern)}
            if not fitting:
                raise ValueError(f"theta_only: {pattern!r} fits none of {len(theta)} weights, e.g. {listed(theta)}.")
            if rows:
                self.rows |= dict.fromkeys(fitting, int(rows["first"]))
            else:
                self.own |= fitting
        self.rows = {name: n for name, n in self.rows.items() if name not in self.own}

    def names(self, anchor: Collection[str]) -> dict[str, str]:
        """Of the anchor's names those that theta shares → theta's; they may differ by one prefix before all of them."""
        shared = [name for name in self._theta if name not in self.own]
        others = [name for name in anchor if not any(fnmatchcase(name, pattern) for pattern in self._patterns)]
        if {*others} != {*shared} and not _differ_by_prefix(others, shared):
            ends = [name for name in others if not any(_ends_alike(name, own) for own in self.own)]
            others = ends if _differ_by_prefix(ends, shared) else others
        return renamed(others, shared)

    def shared(self, theta: Mapping[str, Any]) -> dict[str, Any]:
        """Theta without what is its own as a whole."""
        return {name: tensor for name, tensor in theta.items() if name not in self.own}

    def paired(self, theta: Mapping[str, Any], anchor: Mapping[str, T]) -> dict[str, T]:
        """What the anchor has of what theta shares, by theta's names, as far as they match."""
        names = self.names(anchor)
        paired = {names[name]: tensor for name, tensor in anchor.items() if name in names}
        self._check_rows(theta, paired)
        return paired

    def completed(self, name: str, anchor: Tensor, theta: Tensor) -> Tensor:
        """The anchor's tensor, with theta's new rows if there are any."""
        if name not in self.rows:
            return anchor
        n, anchor = self.rows[name], anchor.detach().to(theta.device)
        wide = torch.promote_types(mixing_precision(anchor.dtype), mixing_precision(theta.dtype))  # loses no row's bits
        return torch.cat([anchor[:n].to(wide), theta.detach()[n:].to(wide)])

    def _check_rows(self, theta: Mapping[str, Any], anchor: Mapping[str, Any]) -> None:
        """The anchor has the rows that theta's tensors begin with, or as many as they, or it is an error."""
        for name, n in self.rows.items():
            ours, theirs = (tuple(weights[name].shape) if name in weights else () for weights in (theta, anchor))
            if not ours or ours[0] <= n or theirs not in ((n, *ours[1:]), ours):
                raise WeightMismatchError(
                    f"theta_only says that rows of {name!r} are new from {n} on: theta must have more of them and the "
                    f"anchor those before; theta is {ours}, the anchor {theirs or 'without it'}."
                )


def _differ_by_prefix(names: Collection[str], others: Collection[str]) -> bool:
    return bool(prefix_before(names, others) or prefix_before(others, names))


def _ends_alike(name: str, other: str) -> bool:
    return other.endswith(f".{name}") or name.endswith(f".{other}")
