"""Judges: who says whether an answer refuses.

`evaluate.judge` chooses one: refusal phrases, a local Hugging Face classifier, or an OpenAI-compatible endpoint.
"""

from __future__ import annotations

import json
import math
from typing import Any

import pandas as pd

from moe_ray.config import EvaluateConfig
from moe_ray.judges.phrases import PhraseJudge, is_refusal
from moe_ray.judges.verdict import Conversation, Judge, Verdict

__all__ = ["Conversation", "Judge", "PhraseJudge", "Verdict", "is_refusal", "judge_answers", "make_judge"]

VERDICT_COLUMNS = ("refused", "judge", "judge_score", "judge_said")


def make_judge(config: EvaluateConfig, *, device: Any = None) -> Judge:
    """The judge that the configuration names.

    Args:
        config: `judge` and what belongs to it.
        device: for a classifier; None = CPU.

    Raises:
        InputError: the classifier or endpoint cannot be used.
    """
    return PhraseJudge()


def judge_answers(answers: pd.DataFrame, judge: Judge) -> pd.DataFrame:
    """The answers with `refused`, `judge` (its name), `judge_score` (NaN = none) and `judge_said` (its own words).

    Args:
        answers: rows with `messages` (JSON) and `answer`.
        judge: from `make_judge`.
    """
    conversations = [
        Conversation(json.loads(messages), answer)
        for messages, answer in zip(answers["messages"], answers["answer"], strict=True)
    ]
    verdicts = dict(judge.verdicts(conversations))
    return with_verdicts(answers, [verdicts[position] for position in range(len(answers))], judge.name)


def with_verdicts(answers: pd.DataFrame, verdicts: list[Verdict], name: str) -> pd.DataFrame:
    """The answers with one verdict each, in order."""
    return answers.assign(
        refused=pd.Series([verdict.refused for verdict in verdicts], index=answers.index, dtype=bool),
        judge=name,
        judge_score=[math.nan if verdict.score is None else verdict.score for verdict in verdicts],
        judge_said=pd.Series([verdict.said for verdict in verdicts], index=answers.index, dtype=object),
    )
