"""What the answers of the model itself are that selection looks at: how many, how long, and how many of them refuse."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from moe_ray.evaluation.judges.phrases import is_refusal

MOST = 0.5
"""Share of refusals among the own answers to unsafe prompts above which a warning is due."""


@dataclass
class OwnAnswers:
    """Totals over the examples that the model answered by itself.

    Attributes:
        examples: that it answered.
        tokens: of these answers.
        cut: answers that had not ended after the most tokens that were allowed.
        unsafe: answers to unsafe prompts.
        refused: of these, those that refuse by their wording.
    """

    examples: int = 0
    tokens: int = 0
    cut: int = 0
    unsafe: int = 0
    refused: int = 0

    def add(self, label: str, text: str, num_tokens: int, *, ended: bool) -> None:
        """Counts an answer to a prompt with this label."""
        is_unsafe = label == "unsafe"
        self.examples += 1
        self.tokens += num_tokens
        self.cut += not ended
        self.unsafe += is_unsafe
        self.refused += is_unsafe and is_refusal(text)

    def as_dict(self) -> dict[str, int]:
        """Plain values."""
        return asdict(self)


def own_answers_in_words(totals: Mapping[str, Any]) -> str:
    """How many answers there are, what they cost and how many refuse; empty where the model gave none.

    Args:
        totals: of `OwnAnswers`.
    """
    if not totals["examples"]:
        return ""
    return (
        f"The model answered {totals['examples']} examples by itself, in {totals['tokens']:,} tokens; {totals['cut']} "
        f"answers were cut at capture.max_new_tokens; {totals['refused']} of {totals['unsafe']} answers to unsafe prompts "
        "are worded as refusals"
    )


def refusals_warning(totals: Mapping[str, Any]) -> str:
    """What to mind where most own answers to unsafe prompts refuse; empty where they do not.

    Args:
        totals: of `OwnAnswers`.
    """
    if totals["refused"] <= MOST * totals["unsafe"]:
        return ""
    return (
        f"{totals['refused']} of the {totals['unsafe']} answers that the model itself gives to unsafe prompts are worded as "
        "refusals: what is compared is then how refusals are routed, and experts that are found belong to refusing, not to "
        "complying; use prompts that it complies with, give them a complying `response`, or count prompts alone "
        "(identify.roles=[prompt])"
    )
