"""Evaluation on held-out examples: answers and losses of a model, their summary, and what changed between two models.

Each held-out example is assigned a *reference batch*: under masked routing it is routed through that batch's mask, and under
any routing it counts for that batch. Under union routing all examples are routed through what is unsafe in any batch.
Nothing is a bare number: each has its n and a 95% interval in which the forms of one request count once.

Shape suffixes: B rows, L MoE layers, E experts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moe_ray.config.evaluate import EvaluateConfig
from moe_ray.errors import InputError
from moe_ray.evaluation.answers import answer_rows
from moe_ray.evaluation.judges import judge_answers, make_judge
from moe_ray.evaluation.samples import SAMPLE, with_sample
from moe_ray.experts import ExpertMasks, ShortLayers, router_mask
from moe_ray.models.forward_groups import GroupContext, as_it_is
from moe_ray.models.generation import Response
from moe_ray.models.moe_layers import find_moe_layers
from moe_ray.models.token_budget import TokenBudget
from moe_ray.progress import Progress
from moe_ray.routing.capture import evaluating
from moe_ray.routing.counter import counting
from moe_ray.routing.counts import RoutingCounts, concat_counts
from moe_ray.routing.masking import route_rows_through, route_through

INPUT_COLUMNS = ("id", "label", "category", "batch_idx", "messages", "target", "target_complete", "pair")
"""What `answer_examples` needs of a held-out example; `batch_idx` is its reference batch."""


def assign_reference_batches(examples: pd.DataFrame, batches: pd.DataFrame) -> pd.Series:
    """The `batch_idx` of each held-out example's reference batch.

    An example goes to a batch of its own category, to all batches where none is of its category, each label in turn over
    those batches in ascending order. The two examples of a pair go to the same batch. Deterministic.

    Args:
        examples: held-out rows with `label`, `category`, `pair`.
        batches: the stored batches, one row per example, with `batch_idx`, `label`, `category`.
    """
    unsafe = batches[batches["label"] == "unsafe"]
    of_category = {str(name): np.unique(rows["batch_idx"]) for name, rows in unsafe.groupby("category")}
    return ReferenceBatches(np.unique(batches["batch_idx"]), of_category).assign(examples)


class ReferenceBatches:
    """Gives each held-out example its reference batch, as `assign_reference_batches` does, piece by piece.

    Args:
        every: all `batch_idx`, ascending.
        of_category: per category those of the batches with unsafe examples of it, ascending.
    """

    def __init__(self, every: npt.NDArray[np.int64], of_category: Mapping[str, npt.NDArray[np.int64]]) -> None:
        self._every, self._of_category = every, of_category
        self._turns: dict[tuple[str, str], int] = defaultdict(int)
        self._of_pair: dict[str, int] = {}

    def assign(self, examples: pd.DataFrame) -> pd.Series:
        """The `batch_idx` of the next examples.

        Args:
            examples: held-out rows with `label`, `category`, `pair`.
        """
        chosen = []
        of_category, of_pair = self._of_category, self._of_pair
        for label, category, pair in examples[["label", "category", "pair"]].itertuples(index=False):
            if isinstance(pair, str) and pair in of_pair:
                chosen.append(of_pair[pair])
                continue
            candidates = of_category.get(category, self._every)
            key = ("pair" if isinstance(pair, str) else label, category if category in of_category else "")
            batch_idx = int(candidates[self._turns[key] % len(candidates)])
            self._turns[key] += 1
            if isinstance(pair, str):
                of_pair[pair] = batch_idx
            chosen.append(batch_idx)
        return pd.Series(chosen, index=examples.index, dtype=np.int64, name="batch_idx")


def rows_to_answer(frame: pd.DataFrame, routings: Sequence[str], samples: int = 1) -> pd.DataFrame:
    """A row per example, kind of routing and sample.

    Args:
        frame: held-out examples.
        routings: of `evaluate.routing`.
        samples: answers to each prompt.

    Returns:
        the rows with `routing`, `sample` (from 0) and `place` in the frame.
    """
    numbered = frame.assign(place=np.arange(len(frame)))
    sampled = [numbered.assign(routing=kind, **{SAMPLE: number}) for kind in routings for number in range(samples)]
    return pd.concat(sampled, ignore_index=True)


@dataclass(frozen=True, kw_only=True)
class Answered:
    """Answers without verdicts, and the routing counts of the prompts under natural routing (None = not counted)."""

    answers: pd.DataFrame
    routing: RoutingCounts | None

    def __repr__(self) -> str:
        return f"Answered({len(self.answers)} answers, routing {'not ' if self.routing is None else ''}counted)"


def answer_examples(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    frame: pd.DataFrame,
    config: EvaluateConfig,
    masks: ExpertMasks | None = None,
    *,
    budget: TokenBudget | None = None,
) -> pd.DataFrame:
    """Answers with verdicts and target losses: the frame that `summarise` and `paired_changes` take.

    Args:
        model: in memory; its training mode is restored afterwards.
        tokenizer: its tokenizer.
        frame: held-out examples, a row each, with `INPUT_COLUMNS`.
        config: `routing`, `max_new_tokens`, `temperature`, `samples`, `tokens_per_forward` and the judge.
        masks: of the run's batches; needed where `routing` is not natural alone.
        budget: of this process, which remembers where its memory ended; None = `config.tokens_per_forward`.

    Returns:
        per example, kind of routing and sample a row with `INPUT_COLUMNS`, `routing` (of `config.routing`), `sample`,
        `answer`, `thought`, `is_unclosed`, `ended`, `target_loss` (summed nats), `target_tokens`, `verdict`,
        `refused`, `judge`, `judge_score`, `judge_said`.

    Raises:
        InputError: masked routing without masks, or a judge that cannot be had.
        OutsideFailed: the judge's endpoint did not answer.
    """
    judge = make_judge(config, device=model.device)
    rows = rows_to_answer(frame, config.routing, config.samples)
    answered = answer_and_count(model, tokenizer, rows, config, masks, budget=budget)
    return judge_answers(answered.answers, judge)


def answer_and_count(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: pd.DataFrame,
    config: EvaluateConfig,
    masks: ExpertMasks | None = None,
    *,
    budget: TokenBudget | None = None,
    count: bool = False,
    short_layers: ShortLayers = "allowed_only",
    progress: Progress | None = None,
    after_thought: bool = False,
    generated: Callable[[pd.DataFrame], list[Response]] | None = None,
) -> Answered:
    """Answers and target losses of the rows, and where asked for the routing of those under natural routing.

    Masked rows of many batches share forward passes, each row under the mask of its own batch. A batch without unsafe
    experts has nothing to route through, so its examples route naturally. Rows under union routing share one mask.

    Args:
        model: its training mode is restored afterwards.
        tokenizer: its tokenizer.
        rows: from `rows_to_answer`.
        config: `max_new_tokens`, `temperature`, `sample_seed` and `tokens_per_forward`.
        masks: needed where a row is not natural.
        budget: of this process, which remembers where its memory ended; None = `config.tokens_per_forward`.
        count: count the prompts' routing, in the same forward passes that score the targets.
        short_layers: for rows that are not natural, the policy that training has (`finetune.short_layers`).
        progress: called with the number of rows that are answered, and of all.
        after_thought: the model is asked for answers without a thought.
        generated: gives the answers to rows under natural routing, where something else has generated them; None = the
            model does.

    Raises:
        InputError: a row is not natural and there are no masks, or a row does not fit in memory.
    """
    if masks is None and (others := sorted({*rows["routing"]} - {"natural"})):
        raise InputError(
            f"{others[0]} routing needs the batches' expert masks; give them, or set evaluate.routing=natural"
        )
    num_answered = 0

    def answered(number: int) -> None:
        nonlocal num_answered
        num_answered += number
        if progress is not None:
            progress(num_answered, len(rows))

    parts, counted = [], []
    budget = budget or TokenBudget(config.tokens_per_forward)
    with evaluating(model):
        for kind, group in rows.groupby("routing", sort=False):
            within: GroupContext = as_it_is
            if masks is not None and kind == "masked":
                within = _own_masks(model, group["batch_idx"].tolist(), masks, short_layers)
            elif masks is not None and kind == "union":
                within = _through_union(model, masks, short_layers)
            # Further samples of prompts alone leave nothing to count.
            counts_some = count and kind == "natural" and (with_sample(group)[SAMPLE] == 0).any()
            counter = counting(model) if counts_some else nullcontext()
            with counter as active:
                answers, counts = answer_rows(
                    *(model, tokenizer, group),
                    max_new_tokens=config.max_new_tokens,
                    budget=budget,
                    temperature=config.temperature,
                    sample_seed=config.sample_seed,
                    counter=active,
                    within=within,
                    answered=answered,
                    after_thought=after_thought,
                    generated=generated(group) if generated is not None and kind == "natural" else None,
                )
            parts.append(answers)
            counted += [] if counts is None else [counts]
    answers = pd.concat(parts).sort_index()
    return Answered(answers=answers, routing=concat_counts(counted) if counted else None)


def _own_masks(
    model: PreTrainedModel, batch_idx: Sequence[int], masks: ExpertMasks, short_layers: ShortLayers
) -> GroupContext:
    """Routes each row of a group through the mask of its batch.

    Args:
        model: which is routed.
        batch_idx: of each row.
        masks: of the batches.
        short_layers: the policy of layers with fewer unsafe experts than a token uses.
    """
    num_experts_per_tok = find_moe_layers(model).num_experts_per_tok
    of_batch = {
        batch: router_mask(masks[batch], num_experts_per_tok=num_experts_per_tok, short_layers=short_layers)
        for batch in set(batch_idx)
    }

    def within(group: Sequence[int]) -> AbstractContextManager[None]:
        masks_BLE = np.stack([of_batch[batch_idx[row]] for row in group])
        return route_rows_through(model, masks_BLE) if masks_BLE.any() else nullcontext()

    return within


def _through_union(model: PreTrainedModel, masks: ExpertMasks, short_layers: ShortLayers) -> GroupContext:
    """Routes every row through the experts that are unsafe in any batch; nothing is restricted where there are none."""
    num_experts_per_tok = find_moe_layers(model).num_experts_per_tok
    union_LE = router_mask(masks.union, num_experts_per_tok=num_experts_per_tok, short_layers=short_layers)
    return lambda group: route_through(model, union_LE) if union_LE.any() else nullcontext()
