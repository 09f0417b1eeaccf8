"""Reading and writing the configuration: YAML → dataclasses → dotted overrides, and back.

An unknown key is an error that names the nearest known one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from moe_ray.config.fields import require
from moe_ray.config.run import Config
from moe_ray.errors import InputError


def load_config(path: str | None = None, overrides: Sequence[str] = ()) -> Config:
    """The configuration of a YAML file with `key.sub=value` overrides on top.

    Raises:
        InputError: the file is missing or not a mapping, a key is unknown, a value has the wrong type or range.
    """
    tree: dict[str, Any] = {}
    if path is not None:
        tree = _read_yaml(path)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise InputError(f"override {override!r}: expected key=value, such as identify.top_k=20")
        _put(tree, key.strip(), _parse_value(text, key))
    config = _build(Config, tree, "")
    assert isinstance(config, Config)
    return config


def flatten(config: object, prefix: str = "") -> dict[str, Any]:
    """Dotted keys to plain values, in declaration order."""
    flat: dict[str, Any] = {}
    for item in dataclasses.fields(typing.cast(Any, config)):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            flat |= flatten(value, f"{prefix}{item.name}.")
        else:
            flat[f"{prefix}{item.name}"] = list(value) if isinstance(value, tuple) else value
    return flat


def describe_keys(kind: type = Config, prefix: str = "") -> Iterator[tuple[str, str, Any, str]]:
    """Yields `(dotted key, type, default, explanation)` of every setting."""
    hints = typing.get_type_hints(kind)
    for item in dataclasses.fields(kind):
        if dataclasses.is_dataclass(hints[item.name]):
            yield from describe_keys(hints[item.name], f"{prefix}{item.name}.")
        else:
            default = item.default if item.default_factory is dataclasses.MISSING else item.default_factory()
            yield f"{prefix}{item.name}", _type_name(hints[item.name]), default, item.metadata["help"]


def to_yaml(config: Config) -> str:
    """The configuration as YAML that `load_config` reads back to an equal one."""
    plain = dataclasses.asdict(config)
    text: str = yaml.safe_dump(_listify(plain), sort_keys=False)
    return text


def with_settings(config: Config, settings: Mapping[str, Any]) -> Config:
    """The configuration with other values of some dotted keys, checked as if they came from a file.

    Raises:
        InputError: a key is unknown, or a value has the wrong type or range.
    """
    tree = _listify(dataclasses.asdict(config))
    for key, value in settings.items():
        _put(tree, key, value)
    changed = _build(Config, tree, "")
    assert isinstance(changed, Config)
    return changed


def value_of_setting(key: str, value: Any) -> Any:
    """`value` as a plain value of the type that a known dotted key takes; `1e-4`, which YAML reads as text, is a number.

    Raises:
        InputError: it has another type.
    """
    *groups, last = key.split(".")
    kind: type = Config
    for group in groups:
        kind = typing.get_type_hints(kind)[group]
    return _listify(_coerce(value, typing.get_type_hints(kind)[last], key))


def _listify(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _listify(item) for key, item in value.items()}
    return [_listify(item) for item in value] if isinstance(value, (tuple, list)) else value


def _read_yaml(path: str) -> dict[str, Any]:
    if not Path(path).is_file():
        raise InputError(f"configuration file {path!r} does not exist; give the path of a YAML file")
    try:
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise InputError(f"{path} is not valid YAML: {error}") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise InputError(f"{path}: got a {type(tree).__name__}, expected a mapping of configuration keys")
    return tree


def _parse_value(text: str, key: str) -> Any:
    try:
        return yaml.safe_load(text) if text else ""
    except yaml.YAMLError as error:
        raise InputError(f"{key}: {text!r} is not a valid YAML value; quote it") from error


def _put(tree: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    for parent in parents:
        child = tree.setdefault(parent, {})
        if not isinstance(child, dict):
            raise InputError(f"{dotted}: {parent} is a value, not a group of settings")
        tree = child
    tree[last] = value


def _build(kind: type, tree: Mapping[str, Any], prefix: str) -> object:
    if not isinstance(tree, Mapping):
        raise InputError(f"{prefix.rstrip('.')}: got {tree!r}, expected a group of settings")
    hints = typing.get_type_hints(kind)
    names = [item.name for item in dataclasses.fields(kind)]
    values: dict[str, Any] = {}
    for name, value in tree.items():
        if name not in names:
            raise InputError(_unknown_key(f"{prefix}{name}"))
        if dataclasses.is_dataclass(hints[name]):
            values[name] = _build(typing.cast(type, hints[name]), value, f"{prefix}{name}.")
        else:
            values[name] = _coerce(value, hints[name], f"{prefix}{name}")
    return kind(**values)


def _unknown_key(key: str) -> str:
    known = [name for name, *_ in describe_keys()]
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.4)
    near = near or [name for name in known if name.rpartition(".")[2] == key.rpartition(".")[2]]
    hint = f"did you mean {near[0]}?" if near else "see --help for all keys"
    return f"unknown configuration key {key!r}; {hint}"


def _coerce(value: Any, hint: Any, key: str) -> Any:
    """`value` as the annotated type, without guessing: only int → float and one item → list of one."""
    origin = typing.get_origin(hint)
    if origin is Literal:
        require(value in typing.get_args(hint), key, value, "one of " + ", ".join(map(str, typing.get_args(hint))))
        return value
    if origin is tuple:
        items = value if isinstance(value, (list, tuple)) else [value]
        return tuple(_coerce(item, typing.get_args(hint)[0], key) for item in items)
    if origin is Mapping:
        require(isinstance(value, Mapping), key, value, "a mapping")
        return dict(value)
    if hint is float and isinstance(value, str):
        # YAML 1.1 reads 5e-4 (no dot) as a string.
        with contextlib.suppress(ValueError):
            value = float(value)
    accepted: tuple[type, ...] = (int, float) if hint is float else (hint,)
    fits = isinstance(value, accepted) and not (isinstance(value, bool) and hint is not bool)
    require(fits, key, value, _type_name(hint))
    return float(value) if hint is float else value


def _type_name(hint: Any) -> str:
    origin = typing.get_origin(hint)
    if origin is Literal:
        return " | ".join(str(choice) for choice in typing.get_args(hint))
    if origin is tuple:
        return f"list of {_type_name(typing.get_args(hint)[0])}"
    if origin is Mapping:
        return "mapping"
    if isinstance(hint, types.UnionType):
        return " or ".join(_type_name(arg) for arg in typing.get_args(hint))
    return {"str": "text", "int": "whole number", "float": "number", "bool": "true or false"}[hint.__name__]


def settings_as_text(config: Config) -> dict[str, str]:
    """Dotted settings as text, for tracking."""
    return {key: str(value) for key, value in flatten(config).items()}
