"""How a setting is declared: its default, its explanation and its bounds."""

from __future__ import annotations

from dataclasses import field
from typing import Any

from moe_ray.errors import InputError

EMBEDDED = "embedded"


def _setting(default: Any, text: str) -> Any:
    """A dataclass field with its explanation, which `--help` prints."""
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


def require(holds: bool, key: str, got: object, expected: str) -> None:
    """Raises InputError, naming the setting, unless `holds`."""
    if not holds:
        raise InputError(f"{key}: got {got!r}, expected {expected}; change it in the YAML file or with {key}=VALUE")
