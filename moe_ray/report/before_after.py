"""The held-out figures before and after the repair, row by row: what the terminal and the page both show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from moe_ray.evaluation.verdict_rates import COST
from moe_ray.report.format import Figure, Shown, difference, is_measured, loss, rate

Block = Mapping[str, Any] | None
"""Figures of one evaluation or of the change between two, as `summarise` and `paired_changes` give them."""

WHENS = ("before", "after", "change")
"""Keys of the three blocks in a summary, in the order in which they are shown."""

REFUSALS = {"unsafe_refusal_rate": "unsafe prompts refused", "safe_refusal_rate": "safe prompts refused"}
RATES = REFUSALS | {
    COST: "safe prompts refused or degenerate",
    "unsafe_harmful_rate": "unsafe prompts answered with harm",
    "unsafe_degenerate_rate": "unsafe prompts, degenerate answers",
    "unsafe_no_answer_rate": "unsafe prompts, thought not finished",
    "safe_no_answer_rate": "safe prompts, thought not finished",
}
_IF_ANY = ("unsafe_degenerate_rate", "unsafe_no_answer_rate", "safe_no_answer_rate")
"""Shown only where either model has some."""

LOSSES = {
    "target_loss": "loss on target responses",
    "neutral_loss": "loss on neutral text",
    "first_token_kl": "KL to the base at the first answer token, safe prompts",
}
ROUTINGS = {
    "natural": "Natural routing",
    "masked": "Routed through each batch's mask",
    "union": "Routed through the unsafe experts of all batches",
}


@dataclass(frozen=True, kw_only=True)
class BeforeAfter:
    """One figure of the base model, of the repaired one, and their paired difference.

    Attributes:
        name: what was measured, or the category it was measured on.
        is_rate: whether it is a rate; else it is a loss (nats per token).
        before: of the base model; None = not measured.
        after: of the repaired model.
        change: after minus before on the same examples.
    """

    name: str
    is_rate: bool
    before: Figure
    after: Figure
    change: Figure

    @property
    def title(self) -> str:
        """The name, with the unit where the numbers do not carry it."""
        unit = "nats" if self.name == LOSSES["first_token_kl"] else "nats/token"
        return self.name if self.is_rate else f"{self.name} ({unit})"

    @property
    def cells(self) -> tuple[Shown, Shown, Shown]:
        """Before, after and change as the cells of a row that starts with `title`."""
        if self.is_rate:
            return rate(self.before), rate(self.after), difference(self.change, "points")
        change = difference(self.change, "nats/token")
        return loss(self.before).without_unit(), loss(self.after).without_unit(), change.without_unit()

    @property
    def n(self) -> int:
        """Examples behind the figures."""
        known = [shown.n for shown in (self.cells[1], self.cells[0]) if shown.n is not None]
        return known[0] if known else 0


def blocks_of(whens: Sequence[Block], routing: str) -> tuple[Block, Block, Block]:
    """The blocks of `before`, `after` and `change` under one kind of routing; None where that was not evaluated."""
    before, after, change = (when if routing == "natural" else when and when.get(routing) for when in whens)
    return before, after, change


def overall_rows(blocks: Sequence[Block]) -> list[BeforeAfter]:
    """Rates and losses over all held-out examples; what neither model was measured on is left out."""
    rows = {key: _row(name, key, blocks) for key, name in (RATES | LOSSES).items()}
    return [row for key, row in rows.items() if _is_shown(key, row)]


def _is_shown(key: str, row: BeforeAfter) -> bool:
    measured = [figure for figure in (row.before, row.after) if is_measured(figure)]
    if key in _IF_ANY:
        return any(isinstance(figure, Mapping) and figure["value"] > 0 for figure in measured)
    return bool(measured)


def category_rows(blocks: Sequence[Block], key: str) -> list[BeforeAfter]:
    """One figure category by category, in alphabetical order; empty where all examples are of one category.

    Args:
        blocks: of `blocks_of`.
        key: of `RATES`.
    """
    known = [(block or {}).get("per_category") or {} for block in blocks]
    names = sorted(known[0].keys() | known[1].keys())
    if len(names) < 2:
        return []
    rows = [_row(name, key, [block.get(name) for block in known]) for name in names]
    rows = [row for row in rows if is_measured(row.before) or is_measured(row.after)]
    return rows if any(_is_shown(key, row) for row in rows) else []


def before_after_table(whens: Sequence[Block]) -> pd.DataFrame:
    """The figures over all held-out examples as text, those under natural routing first.

    Args:
        whens: the blocks of `WHENS`, each with those of other kinds of routing inside where they were evaluated.
    """
    rows = [
        [row.title if routing == "natural" else f"{row.title}, {routing}", *map(str, row.cells), str(row.n)]
        for routing in ROUTINGS
        for row in overall_rows(blocks_of(whens, routing))
    ]
    return pd.DataFrame(rows, columns=["", "before", "after", "paired change", "n"])


def _row(name: str, key: str, blocks: Sequence[Block]) -> BeforeAfter:
    before, after, change = ((block or {}).get(key) for block in blocks)
    return BeforeAfter(name=name, is_rate=key in RATES, before=before, after=after, change=change)
