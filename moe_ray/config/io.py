"""Reading and writing the configuration: YAML → dataclasses → dotted overrides, and back.

All faults are found before any is reported: unknown keys, wrong types, values out of bounds, in the file and in the
overrides alike.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from moe_ray.config.keys import GROUP_VALUES, Key, full_key, groups, keys_of, unknown_key
from moe_ray.config.run import Config
from moe_ray.config.section import Section
from moe_ray.config.values import WrongSettings, fit, plain_value, shortened
from moe_ray.config.yaml_text import parse_yaml
from moe_ray.errors import InputError


def load_config(path: str | None = None, overrides: Sequence[str] = ()) -> Config:
    """The configuration of a YAML file with `key.sub=value` overrides on top.

    Raises:
        InputError: the file is missing or not a mapping; or, all in one error: keys are unknown or given twice under
            two names, values have the wrong type or are out of bounds.
    """
    given = _Given()
    if path is not None:
        tree, given.faults = _read_yaml(path)
        given.take(list(_leaves(tree)))
    entries: list[tuple[str, Any]] = []
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            given.faults.append(f"override {override!r}: expected key=value, such as identify.top_k=20")
            continue
        try:
            value = parse_yaml(text, key)[0] if text else ""
        except InputError:
            given.faults.append(f"{key}: {shortened(text)} is not a valid YAML value; quote it")
        else:
            entries += _leaves({key.strip(): value})
    given.take(entries)
    return given.config()


def parse_config(text: str, *, source: str) -> Config:
    """The configuration of YAML text; `source` names it in errors.

    Raises:
        InputError: see `load_config`.
    """
    given = _Given()
    tree, given.faults = _tree_of(text, source)
    given.take(list(_leaves(tree)))
    return given.config()


def flatten(config: object, prefix: str = "") -> dict[str, Any]:
    """Dotted keys to plain values, in declaration order."""
    flat: dict[str, Any] = {}
    for item in dataclasses.fields(typing.cast(Any, config)):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            flat |= flatten(value, f"{prefix}{item.name}.")
        else:
            flat[f"{prefix}{item.name}"] = plain_value(value)
    return flat


def describe_keys(kind: type[Section] = Config) -> Iterator[tuple[str, str, Any, str]]:
    """Yields `(dotted key, type and bounds, default, explanation)` of every setting, for `--help`."""
    for key in keys_of(kind):
        short = f" (short: {', '.join(key.short_names)})" if key.short_names else ""
        yield key.name, key.kind, key.default, f"{key.setting.text}{short}"


def to_yaml(config: Config) -> str:
    """The configuration as YAML that `load_config` reads back to an equal one."""
    text: str = yaml.safe_dump(plain_value(dataclasses.asdict(config)), sort_keys=False, allow_unicode=True)
    return text


def with_settings(config: Config, settings: Mapping[str, Any]) -> Config:
    """The configuration with other values of some dotted keys, checked as if they came from a file.

    Raises:
        InputError: keys are unknown, or values have the wrong type or are out of bounds.
    """
    given = _Given()
    given.values = flatten(config)
    given.take(list(settings.items()))
    return given.config()


def value_of_setting(key: str, value: Any) -> Any:
    """`value` as a plain value of the type that a known dotted key takes; `1e-4`, which YAML reads as text, is a number.

    Raises:
        InputError: it has another type or is out of bounds.
    """
    known = _known()[key]
    return plain_value(fit(value, known.hint, known.setting, key))


def settings_as_text(config: Config) -> dict[str, str]:
    """Dotted settings as text, for tracking."""
    return {key: str(value) for key, value in flatten(config).items()}


def in_one_line(value: Any) -> str:
    """`value` as YAML in one line, as it stands behind `key:` or `key=`."""
    text: str = yaml.safe_dump(
        plain_value(value), default_flow_style=True, allow_unicode=True, width=math.inf, sort_keys=False
    )
    # YAML ends a document that is a single plain value with three dots.
    return text.removesuffix("...\n").strip()


class _Given:
    """What was given so far, by dotted key, later entries in place of earlier ones, and the faults on the way."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.faults: list[str] = []

    def take(self, entries: Sequence[tuple[str, Any]]) -> None:
        """Adds the entries of one place, a file or the command line, where no setting may come under two names."""
        written: dict[str, str] = {}
        for name, value in entries:
            key = full_key(name if isinstance(value, Mapping) else GROUP_VALUES.get(name, name))
            first = written.setdefault(key, name)
            if first != name:
                self.faults.append(f"{first} and {name} are both given, and mean the same setting; leave one out")
            else:
                self._put(key, value)

    def _put(self, key: str, value: Any) -> None:
        known, parts = _known(), key.split(".")
        if key in known:
            self.values[key] = value
            return
        if key in groups():
            self.faults.append(f"{key}: got {shortened(value)}, expected a group of settings")
            return
        above = next((name for name in map(".".join, _starts(parts)) if name in known), None)
        if above is None:
            self.faults.append(unknown_key(key))
        elif typing.get_origin(known[above].hint) is not Mapping or not isinstance(self.values.get(above, {}), Mapping):
            self.faults.append(f"{key}: {above} is a value, not a group of settings")
        else:
            # Such as sweep.space.identify.top_k: an entry of the mapping that is the value of sweep.space.
            self.values[above] = _with_entry(self.values.get(above, {}), parts[above.count(".") + 1 :], value)

    def config(self) -> Config:
        """The checked configuration.

        Raises:
            WrongSettings: with all faults.
        """
        parts: dict[str, dict[str, Any]] = {name: {} for name in ("", *groups())}
        for key, value in self.values.items():
            group, _, name = key.rpartition(".")
            parts[group][name] = value
        faults, top = list(self.faults), parts.pop("")
        for name, kind in groups().items():
            try:
                top[name] = kind(**parts[name])
            except WrongSettings as error:
                faults += error.args
        try:
            config = Config(**top)
        except WrongSettings as error:
            faults += error.args
        if faults:
            raise WrongSettings(*faults)
        return config


@functools.cache
def _known() -> dict[str, Key]:
    return {key.name: key for key in keys_of()}


def _starts(parts: Sequence[str]) -> Iterator[Sequence[str]]:
    yield from (parts[:end] for end in range(1, len(parts)))


def _with_entry(mapping: Mapping[str, Any], path: Sequence[str], value: Any) -> dict[str, Any]:
    """A copy of a mapping of mappings with one more entry, or another value of it."""
    name, *rest = path
    below = mapping.get(name, {})
    return {**mapping, name: _with_entry(below if isinstance(below, Mapping) else {}, rest, value) if rest else value}


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields names as they are written, groups joined with dots; a group with nothing in it gives nothing."""
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if key in groups() and (value is None or isinstance(value, Mapping)):
            yield from _leaves(value or {}, f"{key}.")
        else:
            yield key, value


def _read_yaml(path: str) -> tuple[dict[str, Any], list[str]]:
    """The tree of a file, and a sentence for each key that stands twice."""
    if not Path(path).is_file():
        raise InputError(f"configuration file {path!r} does not exist; give the path of a YAML file")
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: {error}; save it as UTF-8") from error
    return _tree_of(text, path)


def _tree_of(text: str, source: str) -> tuple[dict[str, Any], list[str]]:
    tree, twice = parse_yaml(text, source)
    if tree is None:
        return {}, []
    if not isinstance(tree, dict):
        raise InputError(f"{source}: got a {type(tree).__name__}, expected a mapping of configuration keys")
    return tree, twice
