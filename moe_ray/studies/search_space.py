"""What a sweep searches: dotted settings with lists of values or ranges, checked before anything starts.

Trials start from the one stored capture and are measured on the same validation prompts. A setting that would need
another capture, or that would change the measure, is therefore refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any, Literal, cast, get_args

from moe_ray.config.io import flatten, value_of_setting, with_settings
from moe_ray.config.keys import full_key
from moe_ray.config.run import Config
from moe_ray.errors import InputError

RangeKind = Literal["uniform", "loguniform", "randint"]

_SEARCHABLE = ("identify.", "finetune.")

_NOT_OF_A_TRIAL = {
    "finetune.num_workers": "a trial trains in one process",
    "finetune.gpus_per_worker": "a trial trains in one process; set sweep.gpus_per_trial",
    "finetune.checkpoint_every": "it changes no result",
}

_NEEDS_CAPTURE = ("seed", "capture.", "prompts.", "model.")


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`: `uniform`, `loguniform`, or whole ones without `high` itself (`randint`)."""

    kind: RangeKind
    low: float
    high: float

    def ends(self) -> tuple[float, float]:
        """The smallest and the largest value that can be drawn."""
        return (int(self.low), int(self.high) - 1) if self.kind == "randint" else (self.low, self.high)


@dataclass(frozen=True)
class SearchSpace:
    """Dotted keys to what they may be.

    Attributes:
        choices: keys with a list of values.
        ranges: keys with a range.
    """

    choices: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    ranges: Mapping[str, Range] = field(default_factory=dict)

    @property
    def settings(self) -> tuple[str, ...]:
        """All keys, those with lists first."""
        return (*self.choices, *self.ranges)

    def grid(self) -> list[dict[str, Any]]:
        """Every combination of the lists; ranges are left out."""
        return [dict(zip(self.choices, values, strict=True)) for values in product(*self.choices.values())]


def read_space(config: Config) -> SearchSpace:
    """The search space of `sweep.space`, with every value checked as a setting of its own.

    Raises:
        InputError: a key is unknown, would need another capture or would change the measure; a value is none that the
            setting takes; a range is given to a grid.
    """
    choices: dict[str, tuple[Any, ...]] = {}
    ranges: dict[str, Range] = {}
    for key, values in _leaves(config.sweep.space, set(flatten(config))):
        _check_key(key, config)
        if key in choices or key in ranges:
            raise InputError(f"sweep.space: {key} is given twice, once under a short name or in a group; leave one out")
        if isinstance(values, Mapping):
            ranges[key] = _read_range(key, values)
        else:
            several = values if isinstance(values, (list, tuple)) else [values]
            choices[key] = tuple(value_of_setting(key, value) for value in several)
            if not choices[key]:
                raise InputError(f"sweep.space: {key} has no value; give a list such as [0.02, 0.05]")
    space = SearchSpace(choices, ranges)
    _check_combinations(config, space)
    if config.sweep.search == "grid" and ranges:
        raise InputError(
            f"sweep.space: {next(iter(ranges))} is a range, which a grid cannot go through; give a list of values, or set "
            "sweep.search=random or optuna"
        )
    return space


def _leaves(tree: Mapping[str, Any], settings: set[str], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields dotted keys with their values, from dotted keys and groups alike."""
    for name, value in tree.items():
        key = f"{prefix}{name}"
        is_group = any(setting.startswith(f"{key}.") for setting in settings)
        if is_group and isinstance(value, Mapping):
            yield from _leaves(value, settings, f"{key}.")
        else:
            yield full_key(key), value


def _check_key(key: str, config: Config) -> None:
    with_settings(config, {key: flatten(config).get(key)})  # an unknown key is refused with the nearest known one
    if key.startswith(_NEEDS_CAPTURE):
        raise InputError(
            f"sweep.space: {key} cannot be searched, because another value needs another capture; run full.py once per "
            "value, with a run_dir of its own"
        )
    if key in _NOT_OF_A_TRIAL:
        raise InputError(f"sweep.space: {key} cannot be searched: {_NOT_OF_A_TRIAL[key]}; leave it out")
    if not key.startswith(_SEARCHABLE):
        raise InputError(
            f"sweep.space: {key} cannot be searched, because trials must be measured alike; expected identify.* or "
            "finetune.*"
        )


def _read_range(key: str, value: Mapping[str, Any]) -> Range:
    kinds = get_args(RangeKind)
    try:
        ((kind, (low, high)),) = value.items()
        numbers = (float(low), float(high))
    except (TypeError, ValueError) as error:
        raise InputError(
            f"sweep.space: {key}: got {dict(value)!r}, expected a list of values or one of "
            f"{', '.join(f'{{{name}: [LOW, HIGH]}}' for name in kinds)}"
        ) from error
    if kind not in kinds:
        raise InputError(f"sweep.space: {key}: got range {kind!r}, expected one of {', '.join(kinds)}")
    whole = kind != "randint" or all(number.is_integer() for number in numbers)
    if not (numbers[0] < numbers[1] and all(map(math.isfinite, numbers)) and whole):
        raise InputError(
            f"sweep.space: {key}: got {kind} from {low} to {high}, expected LOW below HIGH, whole for randint"
        )
    if kind == "loguniform" and numbers[0] <= 0:
        raise InputError(f"sweep.space: {key}: got loguniform from {low}, expected a positive LOW")
    return Range(cast(RangeKind, kind), *numbers)


def _check_combinations(config: Config, space: SearchSpace) -> None:
    """Settings may exclude each other, so what is checked is every combination of the lists and the ranges' ends."""
    ends = {key: span.ends() for key, span in space.ranges.items()}
    for settings in SearchSpace({**space.choices, **ends}).grid():
        with_settings(config, settings)


def winning_config(config: Config, settings: Mapping[str, Any]) -> Config:
    """The configuration of a run with a trial's settings, without the sweep."""
    return with_settings(config, {**settings, "sweep.run": False})
