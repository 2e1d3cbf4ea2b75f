"""Plain values of a file people write, taken as they are: what has another type or an unknown name is an error."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import cattrs
from cattrs.gen import make_dict_structure_fn
from cattrs.v import format_exception

T = TypeVar("T")


def structured(values: dict[str, Any], kind: type[T], source: object) -> T:
    """A dataclass of values as JSON has them. cattrs alone makes "1" of 1, and five classes of "wave!".

    Raises:
        ValueError: A field is missing, unknown or of another type; the message names the source and every such field.
    """
    try:
        return _converter.structure(values, kind)
    except cattrs.BaseValidationError as error:
        raise ValueError(f"{source}: {'; '.join(cattrs.transform_error(error, format_exception=_text))}.") from error


def _text(error: BaseException, kind: type | None) -> str:
    return str(error).rstrip(".") if isinstance(error, (ValueError, TypeError)) else format_exception(error, kind)


def _exact(value: object, *kinds: type) -> Any:
    if type(value) not in kinds:
        raise TypeError(f"{' or '.join(kind.__name__ for kind in kinds)} is expected, got {value!r}")
    return value


def _fields(kind: type) -> Callable[[Any, Any], Any]:
    structure = make_dict_structure_fn(kind, _converter, _cattrs_forbid_extra_keys=True)
    return lambda value, _: structure(_exact(value, dict), kind)


def _elements(value: object, kind: Any) -> tuple[Any, ...]:
    return tuple(_converter.structure(element, get_args(kind)[0]) for element in _exact(value, list))


def _is_choice_or_list(kind: Any) -> bool:
    return get_origin(kind) in (Union, types.UnionType) and {get_origin(arm) for arm in get_args(kind)} == {
        Literal,
        tuple,
    }


def _choice_or_list(value: object, kind: Any) -> Any:
    arm = next(arm for arm in get_args(kind) if (get_origin(arm) is tuple) == isinstance(value, list))
    return _converter.structure(value, arm)


_converter = cattrs.Converter()
_converter.register_structure_hook(str, lambda value, _: _exact(value, str))
_converter.register_structure_hook(bool, lambda value, _: _exact(value, bool))
_converter.register_structure_hook(int, lambda value, _: _exact(value, int))
_converter.register_structure_hook(float, lambda value, _: _exact(value, float, int))
_converter.register_structure_hook_func(lambda kind: get_origin(kind) is tuple, _elements)
_converter.register_structure_hook_func(_is_choice_or_list, _choice_or_list)
_converter.register_structure_hook_factory(dataclasses.is_dataclass, _fields)
