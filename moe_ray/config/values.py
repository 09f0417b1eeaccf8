"""Whether a value fits a setting's type and bounds, and how both are said."""

from __future__ import annotations

import contextlib
import math
import numbers
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from moe_ray.config.fields import Setting
from moe_ray.errors import InputError

_MOST_SHOWN = 300
_TOO_LARGE = 1 << 63
"""Numpy, torch and Parquet have no larger whole numbers."""


class WrongSettings(InputError):
    """One or more faults of a configuration, each with its key; all of them are shown.

    Attributes:
        args: the faults, a sentence each.
    """

    def __init__(self, *faults: str) -> None:
        super().__init__(*faults)

    def __str__(self) -> str:
        """The only fault, or all of them, one a line."""
        if len(self.args) == 1:
            return str(self.args[0])
        return "\n  ".join([f"{len(self.args)} wrong settings; mend them:", *map(str, self.args)])


def shortened(value: object) -> str:
    """A value as Python writes it, cut where it is long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of thousands of digits
        text = f"a very large {type(value).__name__}"
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}…"


def wrong_value(key: str, got: object, expected: str) -> str:
    """The sentence about a value that a setting does not take."""
    return f"{key}: got {shortened(got)}, expected {expected}; change it in the YAML file or with {key}=VALUE"


def fit(value: Any, hint: Any, setting: Setting, key: str) -> Any:
    """`value` as the annotated type and within the bounds.

    Nothing is guessed: a whole number may stand for a number, one item for a list of one, and `5e-4`, which YAML 1.1
    reads as text because it has no dot, for the number.

    Args:
        value: as given in YAML, on the command line or in Python.
        hint: the field's type.
        setting: the field's bounds.
        key: dotted, for the error.

    Raises:
        WrongSettings: the type is another one, or the value is out of bounds.
    """
    origin = typing.get_origin(hint)
    if origin is tuple:
        items = value if isinstance(value, (list, tuple)) else [value]
        return _fit_all(items, typing.get_args(hint)[0], setting, key)
    if is_union(hint):
        number, words = union_parts(hint)
        if isinstance(value, str) and value in typing.get_args(words):
            return value
        try:
            return fit(value, number, setting, key)
        except WrongSettings as error:
            expected = f"{type_name(number)}, {setting.bounds}" if setting.bounds else type_name(number)
            raise WrongSettings(wrong_value(key, value, f"{type_name(words)}, or a {expected}")) from error
    if origin is Literal:
        choices = typing.get_args(hint)
        if isinstance(value, bool):  # YAML has read the word
            value = str(value).lower()
        if isinstance(value, str) and value in choices:
            return value
        raise WrongSettings(wrong_value(key, value, "one of " + ", ".join(choices)))
    if origin is Mapping:
        if isinstance(value, Mapping):
            return dict(value)
        raise WrongSettings(wrong_value(key, value, "a mapping"))
    plain = _as_number(value, hint) if hint in (int, float) else value
    if not isinstance(plain, hint):
        # YAML reads a revision such as 1234 as a number.
        quoted = " in quotes" if hint is str and not isinstance(value, (list, tuple, Mapping)) else ""
        raise WrongSettings(wrong_value(key, value, f"{type_name(hint)}{quoted}"))
    if hint in (int, float):
        if isinstance(plain, int) and abs(plain) >= _TOO_LARGE:
            raise WrongSettings(wrong_value(key, value, "a whole number of 64 bits"))
        if not math.isfinite(plain):
            raise WrongSettings(wrong_value(key, value, "a finite number"))
        if not setting.allows(plain):
            raise WrongSettings(wrong_value(key, plain, setting.bounds))
    return plain


def _fit_all(items: Sequence[Any], hint: Any, setting: Setting, key: str) -> tuple[Any, ...]:
    fitting: list[Any] = []
    faults: list[str] = []
    for item in items:
        try:
            fitting.append(fit(item, hint, setting, key))
        except WrongSettings as error:
            faults += error.args
    if faults:
        raise WrongSettings(*faults)
    return tuple(fitting)


def _as_number(value: Any, kind: type) -> Any:
    """`value` as an `int` or `float` of Python's own where it is such a number; else as it is."""
    if isinstance(value, bool):
        return None
    if kind is int:
        return int(value) if isinstance(value, numbers.Integral) else value
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            return float(value)
    try:
        return float(value) if isinstance(value, numbers.Real) else value
    except OverflowError:
        return math.inf


def is_union(hint: Any) -> bool:
    """Whether a setting takes a number or a word, such as `float | Literal["auto"]`."""
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def union_parts(hint: Any) -> tuple[Any, Any]:
    """The type of the number and the words that may stand for it."""
    number, words = typing.get_args(hint)
    return number, words


def type_name(hint: Any) -> str:
    """A setting's type in words."""
    origin = typing.get_origin(hint)
    if is_union(hint):
        return " | ".join(map(type_name, reversed(union_parts(hint))))
    if origin is Literal:
        return " | ".join(typing.get_args(hint))
    if origin is tuple:
        return f"list of {type_name(typing.get_args(hint)[0])}"
    if origin is Mapping:
        return "mapping"
    names: dict[Any, str] = {str: "text", int: "whole number", float: "number", bool: "true or false"}
    return names[hint]


def plain_value(value: Any) -> Any:
    """`value` with lists for tuples and dictionaries for mappings, as JSON and YAML have them."""
    if isinstance(value, Mapping):
        return {key: plain_value(item) for key, item in value.items()}
    return [plain_value(item) for item in value] if isinstance(value, (tuple, list)) else value
