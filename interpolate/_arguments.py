"""Texts of the command line made into what they stand for."""

from __future__ import annotations

import importlib
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from interpolate._mixing import Progress
from interpolate._operations import Ratio


class EvaluateError(Exception):
    """What the function given to `--evaluate` raised: not bad input of ours, whatever its type."""

    def __init__(self, own: Exception) -> None:
        self.own = own


def ratios_last(arguments: Sequence[str]) -> list[str]:
    """`--anchor-weight` and what belongs to it after everything else, since argparse gives it all that follows."""
    rest, ratios = list(arguments), []
    while "--anchor-weight" in rest[:-1]:
        start = rest.index("--anchor-weight")
        stop = start + 2
        while stop < len(rest) and "=" in rest[start + 1] and _is_pattern(rest[stop]):
            stop += 1
        ratios += rest[start:stop]
        del rest[start:stop]
    return rest + ratios


def _is_pattern(text: str) -> bool:
    pattern, _, weight = text.rpartition("=")
    try:
        return bool(pattern) and not pattern.startswith("-") and float(weight) is not None
    except ValueError:
        return False


def numbers(option: str, text: str) -> list[float]:
    try:
        return [float(number) for number in text.split(",")]
    except ValueError as error:
        raise ValueError(f"{option} takes numbers with commas between them, got {text!r}: {error}.") from error


def ratio(texts: Sequence[str]) -> Ratio:
    """A number, or patterns with one each."""
    try:
        if len(texts) == 1 and "=" not in texts[0]:
            return float(texts[0])
        given = [(pattern, float(weight)) for pattern, _, weight in (text.rpartition("=") for text in texts)]
        ratios = dict(given)
        if "" in ratios:
            raise ValueError("a weight without a pattern must be the only one")
        if len(ratios) < len(given):
            raise ValueError("a pattern is given twice")
        return ratios
    except ValueError as error:
        raise ValueError(f"--anchor-weight takes W or PATTERN=W ..., got {' '.join(texts)!r}: {error}.") from error


def function_of(text: str) -> Callable[[Any], Any]:
    """What `MODULE:FUNCTION` names; what it raises is an `EvaluateError`."""
    module, _, name = text.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module), name, None) if module and name else None
    except ModuleNotFoundError as error:
        if not f"{module}.".startswith(f"{error.name}."):  # one that the user's module imports
            raise EvaluateError(error) from error
        raise ValueError(f"--evaluate takes MODULE:FUNCTION, got {text!r}: {error}.") from error
    except Exception as error:
        raise EvaluateError(error) from error
    if function is None or not callable(function):
        raise ValueError(f"--evaluate takes MODULE:FUNCTION, got {text!r}: there is no such function.")

    def evaluate(weights: Any) -> Any:
        try:
            return function(weights)
        except Exception as error:
            raise EvaluateError(error) from error

    return evaluate


def progress_line() -> Progress:
    """A line on the standard error, once a second, if somebody is looking."""
    last = time.monotonic()

    def show(done: int, total: int) -> None:
        nonlocal last
        if sys.stderr.isatty() and time.monotonic() - last > 1:
            last = time.monotonic()
            print(f"\r{100 * done // total} %", end="\r", file=sys.stderr)

    return show
