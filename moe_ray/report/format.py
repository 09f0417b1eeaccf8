"""How a figure is written, everywhere: one form each for a rate, a loss and a difference, with its 95% interval.

A figure is what `evaluation.intervals` gives as plain values, a mapping with `value` and, where they are known, `low`,
`high` and `n`; a bare number is a figure without an interval. None and NaN mean that it was not measured.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

MISSING = "–"
"""Stands where nothing was measured."""

KEPT_TOGETHER = re.compile(r"\[[-+\d.,% ]+\]|\b(?:n|p) = [\d.,e-]*\d")
"""What no line should end in: an interval, an n, a p (a page would break `5e-05` at its hyphen)."""

Figure = Mapping[str, Any] | float | None

Unit = Literal["points", "nats/token"]
"""Of a difference: percentage points for rates, nats per token for losses."""

_RATE_DIGITS, _LOSS_DIGITS = 1, 3


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A figure as text, in parts, since a page sets them apart; `str` puts them together.

    Attributes:
        value: the number, with its sign where it is a difference.
        unit: after the number; empty where the number says it or the table's head does.
        interval: `[low, high]`, empty where it is not known.
        n: how many examples it is of; None where it is not known.
    """

    value: str
    unit: str = ""
    interval: str = ""
    n: int | None = None

    def __str__(self) -> str:
        return " ".join(part for part in (self.value, self.unit, self.interval) if part)

    def with_n(self) -> str:
        """The text with the number of examples behind it."""
        return str(self) if self.n is None else f"{self} (n = {self.n})"

    def without_unit(self) -> Shown:
        """The same for a table whose head or first column names the unit."""
        return replace(self, unit="")


def rate(figure: Figure) -> Shown:
    """A share of examples as `75.0% [50.5%, 89.8%]`.

    Args:
        figure: of fractions (0 to 1).
    """
    return _shown(figure, lambda share: f"{decimal(100 * share, _RATE_DIGITS)}%")


def loss(figure: Figure) -> Shown:
    """A loss as `1.083 nats/token [0.960, 1.240]`.

    Args:
        figure: in nats per token.
    """
    return _shown(figure, lambda nats: decimal(nats, _LOSS_DIGITS), "nats/token")


def difference(figure: Figure, unit: Unit) -> Shown:
    """A difference as `+75.0 points [+43.8, +89.8]` or `-0.565 nats/token [-0.787, -0.410]`; zero has no sign.

    Args:
        figure: of fractions (-1 to 1) where the unit is points, else in nats per token.
        unit: what it is shown in.
    """
    if unit == "points":
        return _shown(figure, lambda share: decimal(100 * share, _RATE_DIGITS, signed=True), unit)
    return _shown(figure, lambda nats: decimal(nats, _LOSS_DIGITS, signed=True), unit)


def decimal(number: float | None, digits: int = 3, *, signed: bool = False) -> str:
    """A number with so many decimals; what rounds to zero has no sign."""
    if not _is_known(number):
        return MISSING
    rounded = round(float(number), digits)  # type: ignore[arg-type]  # `_is_known` excludes None
    sign = "+" if signed and rounded > 0 else ""
    return f"{sign}{rounded + 0.0:.{digits}f}"  # adding 0.0 turns -0.0 into 0.0


def significant_digits(number: float | None) -> str:
    """A number of any size, such as a p value or seconds, with three significant digits."""
    return f"{number:.3g}" if _is_known(number) else MISSING


def setting(value: object) -> str:
    """The value of a setting: a drawn float is cut to four significant digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def is_measured(figure: Figure) -> bool:
    """Whether a figure has a value."""
    return _is_known(_part(figure, "value"))


def is_significant(figure: Figure) -> bool:
    """Whether a difference's interval is known and excludes zero."""
    low, high = _part(figure, "low"), _part(figure, "high")
    return _is_known(low) and _is_known(high) and (low > 0 or high < 0)


def has_interval(figure: Figure) -> bool:
    """Whether a figure's value and both ends of its interval are known."""
    return all(_is_known(_part(figure, name)) for name in ("value", "low", "high"))


def _shown(figure: Figure, text: Callable[[float], str], unit: str = "") -> Shown:
    n = _part(figure, "n")
    num_examples = int(n) if _is_known(n) else None
    if not is_measured(figure):
        return Shown(value=MISSING, n=num_examples)
    low, high = _part(figure, "low"), _part(figure, "high")
    interval = f"[{text(low)}, {text(high)}]" if _is_known(low) and _is_known(high) else ""
    return Shown(value=text(_part(figure, "value")), unit=unit, interval=interval, n=num_examples)


def _part(figure: Figure, name: str) -> Any:
    if isinstance(figure, Mapping):
        return figure.get(name)
    return figure if name == "value" else None


def _is_known(number: Any) -> bool:
    return number is not None and not math.isnan(number)
