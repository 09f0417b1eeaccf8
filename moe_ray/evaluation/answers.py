"""Answering: what the model says, how well it predicts given texts, and where it routes them meanwhile.

Shape suffixes: B rows, S positions, L MoE layers, E experts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moe_ray.evaluation.samples import SAMPLE, seeds_of, with_sample
from moe_ray.models.forward_groups import GroupContext, as_it_is
from moe_ray.models.generation import Response, generate_answers
from moe_ray.models.loss import answer_loss, target_losses
from moe_ray.models.token_budget import TokenBudget
from moe_ray.models.tokenization import (
    PROMPT,
    TokenizedRow,
    answer_opening_ids,
    encode_prompt,
    pad_rows,
    pad_token_id,
    target_ids,
)
from moe_ray.routing.counter import RoutingCounter
from moe_ray.routing.counts import RoutingCounts

ANSWER_COLUMNS = ("answer", "thought", "is_unclosed", "ended")
"""What is kept of a response, see `Response`; the answer is without its thought, empty where `is_unclosed`."""


def losses_and_counts(
    model: PreTrainedModel,
    counter: RoutingCounter,
    rows: Sequence[TokenizedRow],
    *,
    budget: TokenBudget,
    pad_id: int,
    within: GroupContext = as_it_is,
) -> tuple[list[float], npt.NDArray[np.int32]]:
    """`target_losses`, and from the same forward passes the routing counts (rows, L, E) of the prompts' tokens.

    Rows without an answer are run as well, since their prompts are counted.
    """
    losses = [0.0] * len(rows)
    counts_NLE = np.zeros((len(rows), len(counter.moe_layers), counter.moe_layers.num_experts), dtype=np.int32)

    def work(group: list[int]) -> tuple[list[float], npt.NDArray[np.int32]]:
        chosen = [rows[index] for index in group]
        roles_BS = pad_rows(chosen, pad_id=pad_id).roles_BS.to(model.device)
        slots_B1 = torch.arange(len(chosen), device=model.device).unsqueeze(1)
        counter.start(torch.where(roles_BS == PROMPT, slots_B1, -1), len(chosen))
        try:
            with torch.inference_mode(), within(group):
                found: list[float] = answer_loss(model, chosen, pad_id=pad_id).tolist()
            return found, counter.finish().numpy()
        finally:
            counter.stop()

    for group, (found, counts) in budget.run_all([row.num_tokens for row in rows], work):
        counts_NLE[group] = counts
        for index, loss in zip(group, found, strict=True):
            losses[index] = loss
    return losses, counts_NLE


def answer_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: pd.DataFrame,
    *,
    max_new_tokens: int,
    budget: TokenBudget,
    temperature: float = 0.0,
    sample_seed: int = 0,
    counter: RoutingCounter | None = None,
    within: GroupContext = as_it_is,
    answered: Callable[[int], object] | None = None,
    after_thought: bool = False,
    generated: Sequence[Response] | None = None,
) -> tuple[pd.DataFrame, RoutingCounts | None]:
    """Answers and target losses, and what `counter` counted of the prompts' routing.

    Losses and routing are those of a prompt and not of its answers: rows of further samples of a prompt have no loss
    (`target_tokens` 0), and are not counted.

    Args:
        model: in eval mode.
        tokenizer: its tokenizer.
        rows: with `messages` (JSON), `target` (text or missing) and `target_complete`; with a temperature also `id` and
            `sample`, with a counter `batch_idx`, `place`, `label` and `category`.
        max_new_tokens: longest answer, in tokens.
        budget: of tokens that run at once.
        temperature: 0 = greedy answers; above 0 = drawn, each with random numbers of its example and sample.
        sample_seed: of these random numbers.
        counter: attached to the model by `counting`; None = routing is not counted.
        within: what the rows of a group run in, by position, such as their masks.
        answered: called with the number of rows of each group that is answered.
        after_thought: the model is asked for an answer without a thought, as answers to train towards are.
        generated: the rows' answers, where something else has generated them; None = the model does.

    Returns:
        the rows with `sample`, the `ANSWER_COLUMNS`, `target_loss` (summed nats) and `target_tokens`; and the counts, in
        which `place` is the `in_batch_idx`.
    """
    pad_id = pad_token_id(tokenizer)
    prompts = [encode_prompt(tokenizer, json.loads(text), after_thought=after_thought) for text in rows["messages"]]
    rows = with_sample(rows)
    answers = generated
    if answers is None:
        answers = generate_answers(
            *(model, tokenizer, prompts),
            max_new_tokens=max_new_tokens,
            budget=budget,
            temperature=temperature,
            seeds=seeds_of(rows, sample_seed) if temperature else [],
            within=within,
            answered=answered,
        )
    is_first = (rows[SAMPLE] == 0).to_numpy()
    targets = [
        target_ids(tokenizer, text, complete=bool(complete)) if first and isinstance(text, str) and text else []
        for text, complete, first in zip(rows["target"], rows["target_complete"], is_first, strict=True)
    ]
    # A target stands where an answer does, after an empty thought where the template writes one.
    opening = [] if after_thought else answer_opening_ids(tokenizer)
    scored = [
        TokenizedRow(prompt + opening, target, num_thought=len(opening))
        for prompt, target in zip(prompts, targets, strict=True)
    ]
    routing = None
    if counter is None:
        losses = target_losses(model, scored, budget=budget, pad_id=pad_id, within=within)
    else:
        losses = [0.0] * len(rows)
        counted, positions = rows[is_first], np.flatnonzero(is_first).tolist()
        found, counts = losses_and_counts(
            *(model, counter, [scored[position] for position in positions]),
            budget=budget,
            pad_id=pad_id,
            within=lambda group: within([positions[index] for index in group]),
        )
        for position, loss in zip(positions, found, strict=True):
            losses[position] = loss
        routing = RoutingCounts(
            batch_idx=counted["batch_idx"].to_numpy(dtype=np.int64),
            in_batch_idx=counted["place"].to_numpy(dtype=np.int64),
            label=counted["label"].to_numpy(dtype=object),
            category=counted["category"].to_numpy(dtype=object),
            role=np.full(len(counted), "prompt", dtype=object),
            num_tokens=np.array([len(prompts[position]) for position in positions], dtype=np.int64),
            counts_NLE=counts,
            layers=counter.moe_layers.layers,
            num_experts_per_tok=counter.moe_layers.num_experts_per_tok,
        )
        routing.check()
    filled = rows.assign(
        **answer_columns(answers, rows.index),
        target_loss=losses,
        target_tokens=[len(ids) for ids in targets],
    )
    return filled, routing


def answer_columns(responses: Sequence[Response], index: pd.Index) -> dict[str, pd.Series]:
    """The `ANSWER_COLUMNS` of responses.

    Args:
        responses: in the order of the rows.
        index: of the rows.
    """
    return {
        "answer": pd.Series([response.text for response in responses], index=index, dtype=object),
        "thought": pd.Series([response.thought for response in responses], index=index, dtype=object),
        "is_unclosed": pd.Series([response.is_unclosed for response in responses], index=index, dtype=bool),
        "ended": pd.Series([response.ended for response in responses], index=index, dtype=bool),
    }
