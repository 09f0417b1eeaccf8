"""The causal check of a model in memory, and its findings from what was measured, wherever that was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moe_ray.ablation.effects import BatchEffects, Cost, measure_batch
from moe_ray.ablation.plan import BatchPlan
from moe_ray.ablation.tables import batch_table, effect_table, expert_table
from moe_ray.ablation.verdict import Word, batch_in_words, in_words, of_batch, overall, refusals_in_words
from moe_ray.config.ablate import AblateConfig
from moe_ray.models.expert_copies import experts_are_copies
from moe_ray.models.token_budget import TokenBudget
from moe_ray.progress import Progress


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """What the causal check found.

    Attributes:
        verdict: `causal`, `not`, `undecided`, `nothing` (the model refuses all that it was asked) or `copies` (its experts
            are equal, so that none can be a cause).
        effects: a row per set and scored prompt, see `BatchEffects`.
        answers: a row per prompt, see `BatchEffects`.
        table: a row per kind of set, see `tables.effect_table`.
        batches: a row per batch, see `tables.batch_table`, with its `verdict` and that `in_words`.
        experts: a row per batch and single expert, see `tables.expert_table`.
        cost: forward passes and tokens.
    """

    verdict: Word
    effects: pd.DataFrame
    answers: pd.DataFrame
    table: pd.DataFrame
    batches: pd.DataFrame
    experts: pd.DataFrame
    cost: Cost

    def __repr__(self) -> str:
        return f"Ablation({self.verdict}, {len(self.batches)} batches, {self.cost.forwards} forward passes)"

    def in_words(self) -> str:
        """The verdict over all batches as a sentence with its numbers, and what the model then says."""
        sentences = [in_words(self.verdict, self.table, self.batches), refusals_in_words(self.answers)]
        return " ".join(filter(None, sentences))

    def as_dict(self) -> dict[str, Any]:
        """Plain values for `summary.json`."""
        by_batch = self.batches.set_index(self.batches["batch_idx"].astype(str)).drop(columns="batch_idx")
        return {
            "verdict": self.verdict,
            "in_words": self.in_words(),
            "table": _plain(self.table),
            "per_batch": dict(zip(by_batch.index, _plain(by_batch), strict=True)),
            "forwards": self.cost.forwards,
            "tokens": self.cost.tokens,
        }


def ablate_batches(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    plans: Sequence[BatchPlan],
    config: AblateConfig,
    *,
    seed: int,
    progress: Progress | None = None,
) -> Ablation:
    """The causal check in this process.

    Args:
        model: the base model; its training mode is restored afterwards.
        tokenizer: its tokenizer.
        plans: from `plan_batches`.
        config: the section `ablate`.
        seed: of drawn relabellings.
        progress: called with the number of batches that are done, and of all.

    Raises:
        InputError: a prompt does not fit in memory, or the model's experts cannot be masked.
    """
    if experts_are_copies(model):
        return of_copies()
    budget, measured = TokenBudget(config.tokens_per_forward), []
    for number, plan in enumerate(plans, start=1):
        measured.append(measure_batch(model, tokenizer, plan, config, budget=budget))
        if progress is not None:
            progress(number, len(plans))
    return found_in(measured, config, seed=seed)


def found_in(measured: Sequence[BatchEffects], config: AblateConfig, *, seed: int) -> Ablation:
    """The findings of what was measured.

    Args:
        measured: of each batch.
        config: `alpha`, `min_effect` and `relabellings`.
        seed: of drawn relabellings.
    """
    effects = pd.concat([batch.effects for batch in measured], ignore_index=True)
    answers = pd.concat([batch.answers for batch in measured], ignore_index=True)
    table = effect_table(effects, config, seed=seed) if len(effects) else pd.DataFrame()
    batches = batch_table(effects, answers, config, seed=seed)
    rows: list[Mapping[str, Any]] = [
        {str(key): value for key, value in row.items()} for row in batches.to_dict("records")
    ]
    words = [of_batch(row, config) for row in rows]
    batches["verdict"] = words
    batches["in_words"] = [batch_in_words(row, word) for row, word in zip(rows, words, strict=True)]
    cost = Cost(sum(batch.cost.forwards for batch in measured), sum(batch.cost.tokens for batch in measured))
    return Ablation(
        verdict=overall(table, config),
        effects=effects,
        answers=answers,
        table=table,
        batches=batches,
        experts=expert_table(effects),
        cost=cost,
    )


def of_copies() -> Ablation:
    """What is found of a model whose experts are equal, without asking it anything."""
    empty = pd.DataFrame()
    return Ablation(
        verdict="copies",
        effects=empty,
        answers=pd.DataFrame(columns=["label"]),
        table=empty,
        batches=pd.DataFrame(columns=["batch_idx", "refused"]),
        experts=empty,
        cost=Cost(),
    )


def _plain(table: pd.DataFrame) -> list[dict[str, Any]]:
    rows = table.astype(object).where(table.notna(), None).to_dict("records")
    return [{str(key): value for key, value in row.items()} for row in rows]
