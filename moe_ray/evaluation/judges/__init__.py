"""Judges: who says what an answer is, of five kinds (`verdict.Kind`).

`evaluate.judge` chooses one: phrases, a local Hugging Face classifier, a guard model, or an OpenAI-compatible endpoint.
`judge_answers` is the one entry for verdicts of answers in memory; `moe_ray.orchestration.jobs.judge.judge` is the same in a
run, where verdicts are kept as they come.
"""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from moe_ray.config.evaluate import EvaluateConfig
from moe_ray.evaluation.judges.degenerate import DEGENERATE_VERSION
from moe_ray.evaluation.judges.phrases import RULES_VERSION, PhraseJudge
from moe_ray.evaluation.judges.settled import judged_conversations
from moe_ray.evaluation.judges.verdict import KINDS, TELL_HARM, Conversation, Judge, Kind, Verdict, conversations_of
from moe_ray.storage.fingerprint import content_hash, hash_checkpoint

__all__ = [
    "KINDS",
    "TELL_HARM",
    "Conversation",
    "Judge",
    "Kind",
    "PhraseJudge",
    "Verdict",
    "check_judge",
    "conversations_of",
    "judge_answers",
    "judge_identity",
    "judged_conversations",
    "make_judge",
    "with_verdicts",
]


def make_judge(config: EvaluateConfig, *, device: Any = None) -> Judge:
    """The judge that the configuration names.

    Args:
        config: `judge` and what belongs to it.
        device: for a classifier or a guard; None = CPU.

    Raises:
        InputError: the classifier, guard or endpoint cannot be used.
    """
    if config.judge == "classifier":
        from moe_ray.evaluation.judges.classifier import ClassifierJudge

        return ClassifierJudge(config, device)
    if config.judge == "guard":
        from moe_ray.evaluation.judges.guard import GuardJudge

        return GuardJudge(config, device)
    if config.judge == "endpoint":
        from moe_ray.evaluation.judges.endpoint import EndpointJudge

        return EndpointJudge(config)
    return PhraseJudge()


def check_judge(config: EvaluateConfig) -> None:
    """Refuses a judge that cannot work, before anything is generated; no weights are loaded, nobody is called.

    Raises:
        InputError: the classifier cannot be read or has no such label; the guard cannot be read or is of no known family;
            the endpoint has no address.
    """
    if config.judge == "classifier":
        from moe_ray.evaluation.judges.classifier import check_classifier

        check_classifier(config)
    elif config.judge == "guard":
        from moe_ray.evaluation.judges.guard import check_guard

        check_guard(config)
    elif config.judge == "endpoint":
        from moe_ray.evaluation.judges.endpoint import check_endpoint

        check_endpoint()


def judge_identity(config: EvaluateConfig) -> dict[str, Any]:
    """What a verdict depends on: equal values mean equal verdicts. Holds no address and no key."""
    # Whoever judges, thoughts and degenerate answers are settled by these rules.
    settled = {"judge": config.judge, "degenerate": DEGENERATE_VERSION, "phrases": RULES_VERSION}
    if config.judge == "classifier":
        checkpoint = hash_checkpoint(config.classifier, "main")
        reads = {"input": config.classifier_input, "refusal_label": config.refusal_label}
        return {**settled, "checkpoint": checkpoint, **reads}
    if config.judge == "guard":
        from moe_ray.evaluation.judges.guard_families import family_of

        family = family_of(config.guard, config.guard_family)
        return {**settled, "checkpoint": hash_checkpoint(config.guard, "main"), "asked": content_hash(family.identity)}
    if config.judge == "endpoint":
        from moe_ray.evaluation.judges.endpoint import INSTRUCTIONS

        asked = {"instructions": content_hash(INSTRUCTIONS), "options": dict(config.judge_options)}
        return {**settled, "model": config.judge_model, **asked}
    return settled


def judge_answers(answers: pd.DataFrame, judge: Judge) -> pd.DataFrame:
    """The answers with `verdict` (of `KINDS`), `refused`, `judge` (its name), `judge_score` (NaN = none) and `judge_said`.

    Args:
        answers: rows with `messages` (JSON) and `answer`, and `is_unclosed` where a thought may have had no end.
        judge: from `make_judge`, or one of your own.
    """
    verdicts = dict(judged_conversations(judge, conversations_of(answers)))
    return with_verdicts(answers, [verdicts[position] for position in range(len(answers))], judge.name)


def with_verdicts(answers: pd.DataFrame, verdicts: list[Verdict], name: str) -> pd.DataFrame:
    """The answers with one verdict each, in order."""
    return answers.assign(
        verdict=pd.Series([verdict.kind for verdict in verdicts], index=answers.index, dtype=object),
        refused=pd.Series([verdict.refused for verdict in verdicts], index=answers.index, dtype=bool),
        judge=name,
        judge_score=[math.nan if verdict.score is None else verdict.score for verdict in verdicts],
        judge_said=pd.Series([verdict.said for verdict in verdicts], index=answers.index, dtype=object),
    )
