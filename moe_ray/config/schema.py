"""The JSON schema of the YAML file, for editors: completion, explanations, and a mark under what is misspelt or wrong.

It knows types, choices and bounds of single settings. What several settings must fulfil together is checked when the file
is read.
"""

from __future__ import annotations

import re
import typing
from collections.abc import Mapping
from typing import Any, Literal

from moe_ray.config.keys import ALIASES, GROUP_VALUES, Key, groups, keys_of
from moe_ray.config.values import is_union, plain_value, union_parts

_DIALECT = "https://json-schema.org/draft/2020-12/schema"


def config_schema() -> dict[str, Any]:
    """The JSON schema of a configuration file: every group and setting, and the short names at the top level."""
    properties: dict[str, Any] = {}
    for key in keys_of():
        group, _, name = key.name.rpartition(".")
        if group and group not in properties:
            properties[group] = _group(group)
        parent = properties[group]["properties"] if group else properties
        parent[name] = _setting(key)
    for group, key_name in GROUP_VALUES.items():
        properties[group] = {"anyOf": [properties[group], {"$ref": _reference(key_name)}]}
    for short, key_name in ALIASES.items():
        properties[short] = {"$ref": _reference(key_name), "description": f"short for {key_name}"}
    return {
        "$schema": _DIALECT,
        "title": "moe-ray configuration",
        "type": ["object", "null"],
        "additionalProperties": False,
        "properties": properties,
        # A setting of a group may be written with a dot; as a pattern it is no suggestion of an editor's completion.
        "patternProperties": {
            f"^{re.escape(key.name)}$": {"$ref": _reference(key.name)} for key in keys_of() if "." in key.name
        },
    }


def _group(name: str) -> dict[str, Any]:
    """A group without its settings; it may be empty, as in a file where all its settings are commented out."""
    return {
        "description": (groups()[name].__doc__ or "").partition("\n")[0],
        "type": ["object", "null"],
        "additionalProperties": False,
        "properties": {},
    }


def _setting(key: Key) -> dict[str, Any]:
    bounds = {
        "minimum": key.setting.at_least,
        "exclusiveMinimum": key.setting.above,
        "maximum": key.setting.at_most,
        "exclusiveMaximum": key.setting.below,
    }
    limits = {name: bound for name, bound in bounds.items() if bound is not None}
    if is_union(key.hint):
        number, words = union_parts(key.hint)
        kind: dict[str, Any] = {"anyOf": [{**_type(number), **limits}, _type(words)]}
    else:
        kind = {**_type(key.hint), **limits}
    return {
        "description": f"{key.setting.text}\naffects: {', '.join(key.setting.affects)}",
        **kind,
        "default": plain_value(key.default),
    }


def _type(hint: Any) -> dict[str, Any]:
    origin = typing.get_origin(hint)
    if origin is Literal:
        choices: list[Any] = list(typing.get_args(hint))
        return {"enum": choices + ([True, False] if "true" in choices else [])}
    if origin is tuple:
        item = _type(typing.get_args(hint)[0])
        return {"anyOf": [{"type": "array", "items": item}, item]}
    if origin is Mapping:
        return {"type": "object"}
    names: dict[Any, str] = {str: "string", int: "integer", float: "number", bool: "boolean"}
    return {"type": names[hint]}


def _reference(key: str) -> str:
    """Where the schema has a setting."""
    group, _, name = key.rpartition(".")
    if not group:
        return f"#/properties/{name}"
    choice = "/anyOf/0" if group in GROUP_VALUES else ""
    return f"#/properties/{group}{choice}/properties/{name}"
