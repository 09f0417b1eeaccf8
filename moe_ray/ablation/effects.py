"""What a batch's prompts lose: log-probabilities of the model's own answers while tokens are routed around experts.

Why this and not something else is in docs/cause.md. Nothing is generated but the model's own answers and, where asked for,
those that it gives without the selection. The model is as it was afterwards.

Shape suffixes: N prompts, S sets, L MoE layers, E experts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moe_ray.ablation.expert_sets import SELECTED
from moe_ray.ablation.plan import BatchPlan
from moe_ray.config.ablate import AblateConfig
from moe_ray.errors import InputError
from moe_ray.evaluation.judges.phrases import is_refusal
from moe_ray.experts import Mask
from moe_ray.models.generation import Response, beginning, generate_responses
from moe_ray.models.loss import target_losses
from moe_ray.models.token_budget import TokenBudget
from moe_ray.models.tokenization import TokenizedRow, encode_prompt, pad_token_id
from moe_ray.routing.capture import evaluating
from moe_ray.routing.masking import route_rows_through, route_through

ANSWERED, REFUSED, SILENT = "answered", "refused", "silent"
"""What a prompt's own answer is; only answered ones are scored, safe prompts also where they are refused."""


@dataclass
class Cost:
    """Forward passes and the tokens in them, padding included; a step of generation is a pass of a token for each row."""

    forwards: int = 0
    tokens: int = 0

    def add(self, tokens: int, forwards: int = 1) -> None:
        """Counts some more."""
        self.forwards += forwards
        self.tokens += tokens


@dataclass(frozen=True, kw_only=True)
class BatchEffects:
    """What was measured for a batch.

    Attributes:
        effects: a row per set and scored prompt: `batch_idx, category, set, draw, expert, id, label, pair`, `effect` (nats
            per token that the own answer loses), `experts` (in the set), `share` (of all routed tokens, 0 to 1).
        answers: a row per prompt: `batch_idx, category, id, label, state` (`answered`, `refused` or `silent`), `answer`;
            where answers without the selection were asked for also `answer_without`, `refused_without`.
        cost: forward passes and tokens.
    """

    effects: pd.DataFrame
    answers: pd.DataFrame
    cost: Cost


def measure_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    plan: BatchPlan,
    config: AblateConfig,
    *,
    budget: TokenBudget | None = None,
) -> BatchEffects:
    """The effects of every set of a plan.

    Args:
        model: the base model, in memory; its training mode is restored afterwards.
        tokenizer: its tokenizer.
        plan: of the batch.
        config: `max_new_tokens` and `generate`.
        budget: of this process; None = `config.tokens_per_forward`.

    Raises:
        InputError: a prompt does not fit in memory, or the model's experts cannot be masked.
    """
    budget, cost = budget or TokenBudget(config.tokens_per_forward), Cost()
    prompts = plan.prompts.reset_index(drop=True)
    ids = [encode_prompt(tokenizer, json.loads(messages)) for messages in prompts["messages"]]
    with evaluating(model):
        own = _own_answers(model, tokenizer, ids, plan, config, budget, cost)
        answers = prompts[["id", "label"]].assign(
            state=[_state(response) for response in own], answer=[response.text for response in own]
        )
        is_scored_N = (answers["state"] != SILENT) & ((answers["label"] == "safe") | (answers["state"] == ANSWERED))
        if config.generate and is_scored_N.any():
            answers = _with_answers_without(model, tokenizer, ids, plan, answers, is_scored_N, config, budget, cost)
        scored = np.flatnonzero(is_scored_N)
        rows = [own[place].after(ids[place]) for place in scored]
        effects_SN = _effects(model, rows, plan, budget, cost, pad_id=pad_token_id(tokenizer))
    # Column by column: a frame for each set would take longer than its passes do in a small model.
    of_prompt, num_sets = prompts.loc[scored, ["id", "label", "pair"]], len(plan.sets)
    columns = {name: np.tile(of_prompt[name].to_numpy(dtype=object), num_sets) for name in of_prompt.columns}
    of_set = {
        "set": [item.name for item in plan.sets],
        "draw": [item.draw for item in plan.sets],
        "expert": [item.expert for item in plan.sets],
        "experts": [int(item.mask_LE.sum()) for item in plan.sets],
        "share": plan.shares,
    }
    columns |= {name: np.repeat(np.asarray(values), len(scored)) for name, values in of_set.items()}
    effects = pd.DataFrame({**columns, "effect": effects_SN.ravel()})
    for name in ("set", "expert"):
        effects[name] = effects[name].astype(object)
    return BatchEffects(effects=_named(effects, plan), answers=_named(answers, plan), cost=cost)


def _own_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: Sequence[list[int]],
    plan: BatchPlan,
    config: AblateConfig,
    budget: TokenBudget,
    cost: Cost,
) -> list[Response]:
    """Of all prompts: the beginning of the answer that the plan has, or one that is asked for."""
    names = plan.prompts["id"].tolist()
    missing = [place for place, name in enumerate(names) if name not in plan.answers]
    asked = _generate(model, tokenizer, [ids[place] for place in missing], config, budget, cost) if missing else []
    given = dict(zip(missing, asked, strict=True))
    return [
        given[place]
        if place in given
        else beginning(model, tokenizer, ids[place], plan.answers[name], config.max_new_tokens)
        for place, name in enumerate(names)
    ]


def _state(response: Response) -> str:
    if len(response.ids) == response.num_thought:
        return SILENT
    return REFUSED if is_refusal(response.text) else ANSWERED


def _named(frame: pd.DataFrame, plan: BatchPlan) -> pd.DataFrame:
    frame = frame.reset_index(drop=True)
    frame.insert(0, "batch_idx", plan.batch_idx)
    frame.insert(1, "category", plan.category)
    return frame


def _generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: Sequence[list[int]],
    config: AblateConfig,
    budget: TokenBudget,
    cost: Cost,
) -> list[Response]:
    def work(group: list[int]) -> list[Response]:
        return generate_responses(
            model, tokenizer, [ids[place] for place in group], max_new_tokens=config.max_new_tokens
        )

    found: dict[int, Response] = {}
    for group, responses in budget.run_all(
        [len(prompt) + config.max_new_tokens for prompt in ids], work, max_padding=1.0
    ):
        found |= dict(zip(group, responses, strict=True))
        steps = max(1, *(len(response.ids) for response in responses))
        cost.add(len(group) * (max(len(ids[place]) for place in group) + steps - 1), forwards=steps)
    return [found[place] for place in range(len(ids))]


def _with_answers_without(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: Sequence[list[int]],
    plan: BatchPlan,
    answers: pd.DataFrame,
    is_scored_N: pd.Series,
    config: AblateConfig,
    budget: TokenBudget,
    cost: Cost,
) -> pd.DataFrame:
    """The answers with what the model says without the selection."""
    selection = plan.sets[0]
    assert selection.name == SELECTED, selection.name
    places = np.flatnonzero(is_scored_N)
    with route_through(model, selection.allowed):
        without = _generate(model, tokenizer, [ids[place] for place in places.tolist()], config, budget, cost)
    texts = pd.Series([response.text for response in without], index=answers.index[places], dtype=object)
    refused = pd.Series([is_refusal(text) for text in texts], index=texts.index, dtype=object)
    return answers.assign(answer_without=texts, refused_without=refused)


def _effects(
    model: PreTrainedModel,
    rows: Sequence[TokenizedRow],
    plan: BatchPlan,
    budget: TokenBudget,
    cost: Cost,
    *,
    pad_id: int,
) -> npt.NDArray[np.float64]:
    """(S, N) nats per token that each row's answer loses under each set."""
    if not rows:
        return np.zeros((len(plan.sets), 0))
    shape = plan.sets[0].mask_LE.shape
    # The first is the model as it is: a mask of ones changes no bit.
    allowed = [np.ones(shape, dtype=bool), *(item.allowed for item in plan.sets)]
    losses_SN = _losses(model, rows, allowed, budget, cost, pad_id=pad_id)
    lengths_N = np.array([len(row.answer_ids) for row in rows])
    return np.asarray((losses_SN[1:] - losses_SN[0]) / lengths_N)


def _losses(
    model: PreTrainedModel,
    rows: Sequence[TokenizedRow],
    allowed: Sequence[Mask],
    budget: TokenBudget,
    cost: Cost,
    *,
    pad_id: int,
) -> npt.NDArray[np.float64]:
    """(masks, N) summed loss of each row's answer under each mask, many masks in a pass where the family allows it."""
    every = [row for _ in allowed for row in rows]

    def by_row(group: Sequence[int]) -> AbstractContextManager[None]:
        return route_rows_through(model, np.stack([allowed[place // len(rows)] for place in group]))

    try:
        losses = target_losses(model, every, budget=budget, pad_id=pad_id, within=_counted(every, cost, by_row))
    except InputError:
        # Some families cannot have a mask for each row; what is wrong with others is said again below.
        losses = []
        for mask_LE in allowed:
            around = nullcontext() if mask_LE.all() else route_through(model, mask_LE)
            with around:
                losses += target_losses(model, rows, budget=budget, pad_id=pad_id, within=_counted(rows, cost))
    return np.array(losses, dtype=np.float64).reshape(len(allowed), len(rows))


def _counted(
    rows: Sequence[TokenizedRow],
    cost: Cost,
    within: Callable[[Sequence[int]], AbstractContextManager[None]] = lambda group: nullcontext(),
) -> Callable[[Sequence[int]], AbstractContextManager[None]]:
    """The same context for the rows of a pass, which is counted if it succeeds."""

    @contextmanager
    def counted(group: Sequence[int]) -> Iterator[None]:
        with within(group):
            yield
        cost.add(len(group) * max(rows[place].num_tokens for place in group))

    return counted
