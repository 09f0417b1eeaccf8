"""The settings as the help of a command lists them: by section, each with its type, default and explanation."""

from __future__ import annotations

import dataclasses
import shutil
import textwrap
import typing
from collections.abc import Collection
from typing import Any

import yaml

from moe_ray.config.io import describe_keys
from moe_ray.config.run import Config

_WIDEST = 120


def settings_help(sections: Collection[str] = ()) -> str:
    """The run directory and the settings of some sections.

    Args:
        sections: of the configuration, by name; empty = all.
    """
    columns = min(shutil.get_terminal_size((_WIDEST, 24)).columns, _WIDEST)
    lines = ["settings, here as KEY=VALUE or in the YAML file as a tree:"]
    explained = {"": "of the whole run", **_explanations()}
    current = None
    for key, kind, default, text in describe_keys():
        section = key.rpartition(".")[0]
        if sections and section not in sections and key != "run_dir":
            continue
        if section != current:
            lines += ["", f"{section}: {explained[section]}" if section else f"{explained[section]}:"]
            current = section
        lines += [f"  {key}={as_value(default)}  ({kind})"]
        lines += textwrap.wrap(text, columns, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


def as_value(default: Any) -> str:
    """A default as it is written after `KEY=`: YAML in one line."""
    plain = list(default) if isinstance(default, tuple) else default
    text: str = yaml.safe_dump(plain, default_flow_style=True, sort_keys=False, width=10_000)
    return text.removesuffix("\n").removesuffix("\n...")


def _explanations() -> dict[str, str]:
    """Per section the first line of its docstring."""
    hints = typing.get_type_hints(Config)
    sections = {item.name: hints[item.name] for item in dataclasses.fields(Config)}
    return {
        name: str(kind.__doc__).strip().splitlines()[0]
        for name, kind in sections.items()
        if dataclasses.is_dataclass(kind)
    }
