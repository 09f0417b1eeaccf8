"""Which settings affect what: those that decide whether a stored result can be used again."""

from __future__ import annotations

from typing import Any

from moe_ray.config.fields import Effect
from moe_ray.config.keys import keys_of
from moe_ray.config.run import Config
from moe_ray.config.values import plain_value


def settings_affecting(config: Config, *effects: Effect) -> dict[str, Any]:
    """The settings under whose other values any of `effects` would come out differently.

    Returns:
        dotted key to plain value, which JSON can hold, in the order of declaration.
    """
    asked = set(effects)
    return {key.name: plain_value(key.value_in(config)) for key in keys_of() if asked & set(key.setting.affects)}
