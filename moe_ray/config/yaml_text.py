"""YAML text from people and programs: read by the safe loader, small whatever it claims, and every fault in one sentence."""

from __future__ import annotations

from typing import Any

import yaml

from moe_ray.errors import InputError

_MOST_VALUES = 100_000
"""An alias repeats what it names; some hundred bytes of aliases of aliases stand for gigabytes."""


class _Loader(yaml.SafeLoader):
    """Keeps note of keys that stand twice in the same mapping, of which YAML drops the first without a word."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.twice: list[str] = []

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The mapping, with its repeated keys noted."""
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                self.twice.append(
                    f"{key.value}: stands twice, again in line {key.start_mark.line + 1}; put both into one"
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


def parse_yaml(text: str, source: str) -> tuple[Any, list[str]]:
    """What the text says, and a sentence for each key that stands twice.

    Args:
        text: YAML.
        source: what it is, for errors.

    Raises:
        InputError: it is not valid YAML, or stands for more than a configuration can need.
    """
    try:
        loader = _Loader(text)
        value = loader.get_single_data()
        too_large = _num_values(value, {}) > _MOST_VALUES
    except RecursionError as error:
        raise InputError(f"{source} is nested too deeply; expected settings in groups") from error
    except (yaml.YAMLError, ValueError, TypeError, OverflowError) as error:
        # A number of thousands of digits, a date that is none, a list as a key.
        raise InputError(f"{source} is not valid YAML: {_in_short(error)}; mend or quote it") from error
    if too_large:
        raise InputError(f"{source} stands for more than {_MOST_VALUES:,} values; write its aliases (*name) out")
    return value, loader.twice


def _num_values(value: Any, known: dict[int, int]) -> int:
    """Values in it, those that aliases repeat counted each time; each is looked at once."""
    if not isinstance(value, (dict, list)):
        return 1
    if (number := known.get(id(value))) is None:
        known[id(value)] = _MOST_VALUES + 1  # what holds itself is without end
        items = [*value.keys(), *value.values()] if isinstance(value, dict) else value
        known[id(value)] = number = 1 + sum(_num_values(item, known) for item in items)
    return number


def _in_short(error: Exception) -> str:
    said = str(error)
    return said if len(said) <= 500 else f"{said[:500]}…"
