"""Judges: who says whether an answer refuses.

`evaluate.judge` chooses one: refusal phrases, a local Hugging Face classifier, or an OpenAI-compatible endpoint.
"""

from __future__ import annotations

import json
import math
from typing import Any

import pandas as pd

from moe_ray.config.evaluate import EvaluateConfig
from moe_ray.evaluation.judges.phrases import RULES_VERSION, PhraseJudge
from moe_ray.evaluation.judges.verdict import Conversation, Judge, Verdict
from moe_ray.storage.fingerprint import content_hash, hash_checkpoint

__all__ = [
    "Conversation",
    "Judge",
    "PhraseJudge",
    "Verdict",
    "check_judge",
    "judge_answers",
    "judge_identity",
    "make_judge",
    "with_verdicts",
]


def make_judge(config: EvaluateConfig, *, device: Any = None) -> Judge:
    """The judge that the configuration names.

    Args:
        config: `judge` and what belongs to it.
        device: for a classifier; None = CPU.

    Raises:
        InputError: the classifier or endpoint cannot be used.
    """
    if config.judge == "classifier":
        from moe_ray.evaluation.judges.classifier import ClassifierJudge

        return ClassifierJudge(config, device)
    if config.judge == "endpoint":
        from moe_ray.evaluation.judges.endpoint import EndpointJudge

        return EndpointJudge(config)
    return PhraseJudge()


def check_judge(config: EvaluateConfig) -> None:
    """Refuses a judge that cannot work, before anything is generated; nothing is loaded or called.

    Raises:
        InputError: the classifier cannot be read or has no such label; the endpoint has no address.
    """
    if config.judge == "classifier":
        from moe_ray.evaluation.judges.classifier import check_classifier

        check_classifier(config)
    elif config.judge == "endpoint":
        from moe_ray.evaluation.judges.endpoint import check_endpoint

        check_endpoint()


def judge_identity(config: EvaluateConfig) -> dict[str, Any]:
    """What a verdict depends on: equal values mean equal verdicts. Holds no address and no key."""
    if config.judge == "classifier":
        checkpoint = hash_checkpoint(config.classifier, "main")
        reads = {"input": config.classifier_input, "refusal_label": config.refusal_label}
        return {"judge": config.judge, "checkpoint": checkpoint, **reads}
    if config.judge == "endpoint":
        from moe_ray.evaluation.judges.endpoint import INSTRUCTIONS

        return {"judge": config.judge, "model": config.judge_model, "instructions": content_hash(INSTRUCTIONS)}
    return {"judge": config.judge, "rules": RULES_VERSION}


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
