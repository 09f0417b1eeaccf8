"""What a trial or an arm of a comparison is judged by: answers and losses, as tables."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Held-out answers of a model, and its losses on neutral text.

    Attributes:
        answers: from `answer_examples`, under natural routing.
        neutral: from `text_losses`, None = no neutral text was given.
    """

    answers: pd.DataFrame
    neutral: pd.DataFrame | None

    def __repr__(self) -> str:
        texts = 0 if self.neutral is None else len(self.neutral)
        return f"Measured({len(self.answers)} answers, {texts} neutral texts)"
