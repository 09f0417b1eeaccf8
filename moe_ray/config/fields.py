"""How a setting is declared: its default, its explanation, what it affects and its bounds.

Sections are plain dataclasses, checked by some lines of `values.py`. As pydantic's dataclasses they take four times as long
to import (0.13 s instead of 0.03 s) and 17 MiB more, in every command and every worker, and each kind of pydantic's errors
would need a translation into a sentence that names the key and what to do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import Field, dataclass, field
from typing import Any, Literal

Effect = Literal[
    "examples",
    "targets",
    "counts",
    "masks",
    "weights",
    "answers",
    "verdicts",
    "ablation",
    "attacks",
    "harness",
    "search",
    "presentation",
    "speed",
]

EFFECTS: Mapping[Effect, str] = {
    "examples": "which prompts, batches and held-out examples there are",
    "targets": "the answers that they are trained towards",
    "counts": "the routing counts",
    "masks": "which experts are called unsafe, and the table of risk differences",
    "weights": "the learned experts",
    "answers": "the held-out answers and losses",
    "verdicts": "who judges the answers, and how",
    "ablation": "what the causal check takes away, asks and concludes",
    "attacks": "what an attack does, and which prompts it is tried on",
    "harness": "what tasks of harnesses ask, and of how many samples",
    "search": "what a sweep or a comparison tries, or which attacks and tasks of harnesses are done",
    "presentation": "the report, the tracking, and where things are written",
    "speed": "how fast it goes, with how much memory, on how many machines, and when it gives up; not what comes out",
}
"""What a setting may affect. A stage is run again when a setting was changed that affects its result."""

EMBEDDED = "embedded"
"""Stands for the model or the prompts that ship with moe-ray."""

_KEY = "setting"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is declared about a setting beside its type and default.

    Attributes:
        text: explanation for a newcomer, in one sentence.
        affects: what comes out differently under another value.
        at_least: smallest value.
        above: every value is larger than this.
        at_most: largest value.
        below: every value is smaller than this.
    """

    text: str
    affects: tuple[Effect, ...]
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None

    def allows(self, number: float) -> bool:
        """Whether a number is within the bounds; NaN never is."""
        return (
            (self.at_least is None or number >= self.at_least)
            and (self.above is None or number > self.above)
            and (self.at_most is None or number <= self.at_most)
            and (self.below is None or number < self.below)
        )

    @property
    def bounds(self) -> str:
        """The bounds in words, such as `1 or more` or `0 to below 1`; empty without any."""
        if self.at_least is not None:
            if self.at_most is not None:
                return f"{self.at_least:g} to {self.at_most:g}"
            return f"{self.at_least:g} or more" if self.below is None else f"{self.at_least:g} to below {self.below:g}"
        upper = "" if self.at_most is None else f"at most {self.at_most:g}"
        upper = upper if self.below is None else f"below {self.below:g}"
        lower = "" if self.above is None else f"above {self.above:g}"
        return " and ".join(filter(None, [lower, upper]))


def setting(
    default: Any,
    text: str,
    *,
    affects: Effect | tuple[Effect, ...],
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
) -> Any:
    """A dataclass field that is a setting.

    Args:
        default: value where nothing is given.
        text: explanation, which `--help`, the JSON schema and `docs/settings.md` show.
        affects: what comes out differently under another value: one or several of `EFFECTS`.
        at_least: smallest value.
        above: every value is larger than this.
        at_most: largest value.
        below: every value is smaller than this.
    """
    declared = Setting(
        text=text,
        affects=(affects,) if isinstance(affects, str) else affects,
        at_least=at_least,
        above=above,
        at_most=at_most,
        below=below,
    )
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata={_KEY: declared})
    return field(default=default, metadata={_KEY: declared})


def declared(item: Field[Any]) -> Setting:
    """What `setting` was told about a field."""
    found = item.metadata[_KEY]
    assert isinstance(found, Setting)
    return found
