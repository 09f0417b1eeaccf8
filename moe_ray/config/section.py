"""What every group of settings has in common: each value is checked when it is built, in Python as from a file."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Hashable, Iterator
from typing import Any, ClassVar, cast, get_type_hints

from moe_ray.config.fields import declared
from moe_ray.config.values import WrongSettings, fit, wrong_value


class Section:
    """Base of the frozen dataclasses that hold settings.

    Attributes:
        group: name of the group in the YAML tree; empty for the tree's root.
    """

    group: ClassVar[str] = ""

    def __post_init__(self) -> None:
        """Checks types and bounds of every field, then what several fields must fulfil together.

        Raises:
            WrongSettings: with all faults of the fields or, where each field is right, all faults of `faults`.
        """
        found: list[str] = []
        for item in dataclasses.fields(cast(Any, self)):
            try:
                # The dataclass is frozen for its users; a list becomes a tuple and 1 becomes 1.0 only here.
                object.__setattr__(self, item.name, self._checked(item))
            except WrongSettings as error:
                found += error.args
        found = found or list(self.faults())
        if found:
            raise WrongSettings(*found)

    def _checked(self, item: dataclasses.Field[Any]) -> Any:
        value, hint, key = getattr(self, item.name), field_types(type(self))[item.name], self.key(item.name)
        if not dataclasses.is_dataclass(hint):
            return fit(value, hint, declared(item), key)
        if not isinstance(value, cast(type[Any], hint)):
            raise WrongSettings(wrong_value(key, value, f"a {cast(type[Any], hint).__name__}"))
        return value

    def faults(self) -> Iterator[str]:
        """Yields a sentence for each rule over several fields, or over a field's items, that does not hold."""
        yield from ()

    def wrong(self, name: str, expected: str, got: object = ...) -> str:
        """The sentence about a field's value; `got` only where it is not the whole value that is wrong."""
        return wrong_value(self.key(name), getattr(self, name) if got is ... else got, expected)

    def key(self, name: str) -> str:
        """A field's dotted key."""
        return f"{self.group}.{name}" if self.group else name


def field_types(kind: type[Section]) -> dict[str, Any]:
    """The types of a section's fields by name."""
    return _field_types(cast(Hashable, kind))


@functools.cache
def _field_types(kind: Hashable) -> dict[str, Any]:
    hints = get_type_hints(kind)
    return {item.name: hints[item.name] for item in dataclasses.fields(cast(Any, kind))}
