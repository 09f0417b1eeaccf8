"""A YAML file to begin with: every setting with its explanation and its default, commented out."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

from moe_ray.config.io import in_one_line
from moe_ray.config.keys import Key, groups, keys_of

_HEAD = """\
# Settings of moe-ray, each commented out at its default. Remove the # in front of those that you change, and give this
# file with --config FILE. KEY=VALUE on the command line, such as identify.top_k=20, wins over the file.
"""

_WIDTH = 110


def config_template() -> str:
    """A configuration file that changes nothing: reading it gives `Config()`."""
    lines, current = [_HEAD], ""
    for key in keys_of():
        group, _, name = key.name.rpartition(".")
        if group != current:
            current = group
            summary = (groups()[group].__doc__ or "").partition("\n")[0]
            lines += [f"# {summary}", f"{group}:"]
        lines.append(_commented(key, name, indent="  " if group else ""))
    return "\n".join(lines)


def _commented(key: Key, name: str, *, indent: str) -> str:
    """A setting's explanation (`# ` in front) and default (`#` in front), and an empty line."""
    margin = f"{indent}# "
    text = textwrap.fill(
        f"{key.setting.text} ({key.kind})",
        width=_WIDTH,
        initial_indent=margin,
        subsequent_indent=margin,
        break_long_words=False,
        break_on_hyphens=False,
    )
    values = [f"{indent}#{line}" for line in _as_yaml(name, key.default).splitlines()]
    return "\n".join([text, *values, ""])


def _as_yaml(name: str, value: Any) -> str:
    """A setting as a line; a mapping as a line for each of its entries, below the name, or as `{}` where it has none."""
    if isinstance(value, Mapping) and value:
        return "\n".join([f"{name}:", *(f"  {key}: {in_one_line(item)}" for key, item in value.items())])
    return f"{name}: {in_one_line(value)}"
