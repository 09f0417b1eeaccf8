"""Held-out evaluation of a model in memory, in one process: answers, verdicts, figures, and what changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moe_ray.config.evaluate import EvaluateConfig
from moe_ray.evaluation.evaluate import answer_and_count, rows_to_answer
from moe_ray.evaluation.first_token_pass import first_token_table
from moe_ray.evaluation.judges import judge_answers, make_judge
from moe_ray.evaluation.metrics import paired_changes, summarise
from moe_ray.experts import ExpertMasks, ShortLayers
from moe_ray.models.loss import text_losses
from moe_ray.models.token_budget import TokenBudget
from moe_ray.progress import Progress
from moe_ray.prompts.neutral_texts import neutral_texts
from moe_ray.routing.capture import evaluating
from moe_ray.routing.counts import RoutingCounts

NO_BATCH = -1
"""The `batch_idx` of held-out examples for which no training batch stands."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What a model answers to held-out examples, and what that says.

    Attributes:
        answers: per example and kind of routing its answer, losses and verdict, from `answer_examples`.
        metrics: from `summarise`: rates and losses, each with n and 95% interval.
        change: from `paired_changes`: what changed since `before`; None = nothing to compare with.
        neutral: losses on neutral text, from `text_losses`.
        routing: counts of the prompts under natural routing; None = none were routed so.
        first_tokens: what the model says first to safe prompts, from `first_token_table`; None = none were routed so.
    """

    answers: pd.DataFrame
    metrics: Mapping[str, Any]
    change: Mapping[str, Any] | None
    neutral: pd.DataFrame
    routing: RoutingCounts | None
    first_tokens: pd.DataFrame | None = None

    def __repr__(self) -> str:
        rates = {label: self.metrics[f"{label}_refusal_rate"]["value"] for label in ("unsafe", "safe")}
        refused = [f"{label} refused {rate:.0%}" for label, rate in rates.items() if rate is not None]
        return f"Evaluation({', '.join([f'{len(self.answers)} answers', *refused])})"

    def to_frame(self) -> pd.DataFrame:
        """The answers, a row each."""
        return self.answers


def evaluate_held_out(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    frame: pd.DataFrame,
    config: EvaluateConfig,
    masks: ExpertMasks | None = None,
    *,
    before: Evaluation | None = None,
    short_layers: ShortLayers = "allowed_only",
    progress: Progress | None = None,
) -> Evaluation:
    """Answers to the examples, with verdicts, figures and losses on neutral text.

    Args:
        model: its training mode is restored afterwards.
        tokenizer: its tokenizer.
        frame: held-out examples, a row each, with `INPUT_COLUMNS`; `batch_idx` may be `NO_BATCH`.
        config: the section `evaluate`.
        masks: of the batches; needed where `config.routing` is not natural alone.
        before: of the base model on the same examples, to compare with.
        short_layers: for other than natural routing, the policy that training has.
        progress: called with the number of answers that are done, and of all.

    Raises:
        InputError: other than natural routing without masks, a judge that cannot be had, or `before` is of other examples.
    """
    judge, budget = make_judge(config, device=model.device), TokenBudget(config.tokens_per_forward)
    texts = neutral_texts(config.neutral_file)
    with evaluating(model):
        answered = answer_and_count(
            *(model, tokenizer, rows_to_answer(frame, config.routing, config.samples), config, masks),
            budget=budget,
            count=True,
            short_layers=short_layers,
            progress=progress,
        )
        neutral = text_losses(model, tokenizer, texts, budget=budget)
        first_tokens = None
        if "natural" in config.routing:
            first_tokens = first_token_table(
                *(model, tokenizer, frame[frame["label"] == "safe"]),
                budget=budget,
                at=None if before is None else before.first_tokens,
            )
    judged = judge_answers(answered.answers, judge).drop(columns="place")
    return _with_figures(judged, neutral, answered.routing, first_tokens, before)


def _with_figures(
    answers: pd.DataFrame,
    neutral: pd.DataFrame,
    routing: RoutingCounts | None,
    first_tokens: pd.DataFrame | None,
    before: Evaluation | None,
) -> Evaluation:
    change = None
    if before is not None:
        change = paired_changes(before.answers, answers, neutral_before=before.neutral, neutral_after=neutral)
    metrics = summarise(
        answers,
        neutral=neutral,
        routing=routing,
        routing_before=None if before is None else before.routing,
        first_tokens=first_tokens,
        first_tokens_before=None if before is None else before.first_tokens,
    )
    if (answers["batch_idx"] == NO_BATCH).all():
        metrics["per_batch"] = {}
        if change is not None:
            change["per_batch"] = {}
    return Evaluation(
        answers=answers, metrics=metrics, change=change, neutral=neutral, routing=routing, first_tokens=first_tokens
    )
