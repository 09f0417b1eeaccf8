"""Answering: what the model says, how well it predicts given texts, and where it routes them meanwhile.

Shape suffixes: B rows, S positions, L MoE layers, E experts.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moe_ray.chat import PROMPT, TokenizedRow, encode_answer, encode_prompt, pad_rows, pad_token_id
from moe_ray.config import EvaluateConfig
from moe_ray.loss import answer_loss, micro_batches
from moe_ray.routing import RoutingCounter, RoutingCounts

_MAX_TEXT_TOKENS = 1_024
_TOKENS_PER_FORWARD = 8_192
"""Of texts whose every token is predicted: the logits of more would not fit beside a large model."""


def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    rows_per_forward: int,
) -> list[tuple[str, bool]]:
    """Greedy answers, in the prompts' order.

    Args:
        model: in eval mode.
        tokenizer: decodes; its end-of-turn token ends an answer.
        prompts: token ids of each prompt.
        max_new_tokens: an answer's greatest length in tokens.
        rows_per_forward: prompts generated at once; prompts of similar length share a forward pass.

    Returns:
        per prompt its answer and whether it ended by itself.
    """
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    answers: list[tuple[str, bool]] = [("", False)] * len(prompts)
    ends = _end_ids(model, tokenizer)
    for start in range(0, len(order), rows_per_forward):
        chosen = order[start : start + rows_per_forward]
        padded = pad_rows(
            [TokenizedRow(list(prompts[index]), []) for index in chosen], pad_id=pad_token_id(tokenizer), left=True
        ).to(model.device)
        with torch.inference_mode():
            generate: Any = model.generate
            output_BS = generate(
                input_ids=padded.input_ids_BS,
                attention_mask=padded.attention_mask_BS,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=sorted(ends) or None,
                pad_token_id=pad_token_id(tokenizer),
            )
        for index, ids in zip(chosen, output_BS[:, padded.input_ids_BS.shape[1] :].tolist(), strict=True):
            text = str(tokenizer.decode(ids, skip_special_tokens=True)).strip()
            answers[index] = (text, bool(ends & set(ids)))
    return answers


def _end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    configured = getattr(model.generation_config, "eos_token_id", None)
    ends = set(configured) if isinstance(configured, list) else {configured}
    return {int(end) for end in ends | {tokenizer.eos_token_id} if end is not None}


def target_losses(
    model: PreTrainedModel, rows: Sequence[TokenizedRow], *, rows_per_forward: int, pad_id: int
) -> list[float]:
    """Summed loss (nats) of each row's answer tokens, in order."""
    losses: list[float] = []
    for start in range(0, len(rows), rows_per_forward):
        with torch.inference_mode():
            losses += answer_loss(model, rows[start : start + rows_per_forward], pad_id=pad_id).tolist()
    return losses


def losses_and_counts(
    model: PreTrainedModel,
    counter: RoutingCounter,
    rows: Sequence[TokenizedRow],
    *,
    rows_per_forward: int,
    pad_id: int,
) -> tuple[list[float], npt.NDArray[np.int32]]:
    """`target_losses`, and from the same forward passes the routing counts (rows, L, E) of the prompts' tokens.

    Rows of similar length share a pass.
    """
    order = sorted(range(len(rows)), key=lambda place: len(rows[place].prompt_ids))
    losses: list[float] = []
    counts = []
    for start in range(0, len(rows), rows_per_forward):
        chosen = [rows[place] for place in order[start : start + rows_per_forward]]
        roles_BS = pad_rows(chosen, pad_id=pad_id).roles_BS.to(model.device)
        places_B1 = torch.arange(len(chosen), device=model.device).unsqueeze(1)
        counter.start(torch.where(roles_BS == PROMPT, places_B1, -1), len(chosen))
        losses += target_losses(model, chosen, rows_per_forward=len(chosen), pad_id=pad_id)
        counts.append(counter.finish().numpy())
    back = np.argsort(order)
    return [losses[place] for place in back], np.concatenate(counts)[back]


def answer_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: pd.DataFrame,
    config: EvaluateConfig,
    counter: RoutingCounter | None = None,
) -> tuple[pd.DataFrame, RoutingCounts | None]:
    """Greedy answers and target losses as the model routes now, and what `counter` counted of the prompts' routing.

    Args:
        model: in eval mode.
        tokenizer: its tokenizer.
        rows: with `messages` (JSON), `target` (text or missing) and `target_complete`; with a counter also `batch_idx`,
            `place`, `label` and `category`.
        config: `max_new_tokens` and `rows_per_forward`.
        counter: attached to the model by `counting`; None = routing is not counted.

    Returns:
        the rows with `answer`, `ended`, `target_loss` (summed nats) and `target_tokens`; and the counts, in which `place`
        is the `in_batch_idx`.
    """
    size, pad_id = config.rows_per_forward, pad_token_id(tokenizer)
    prompts = [encode_prompt(tokenizer, json.loads(text)) for text in rows["messages"]]
    answers = generate_answers(model, tokenizer, prompts, max_new_tokens=config.max_new_tokens, rows_per_forward=size)
    targets = [
        encode_answer(tokenizer, text, complete=bool(complete)) if isinstance(text, str) and text else []
        for text, complete in zip(rows["target"], rows["target_complete"], strict=True)
    ]
    scored = [TokenizedRow(prompt, target) for prompt, target in zip(prompts, targets, strict=True)]
    routing = None
    if counter is None:
        losses = _losses_by_length(model, scored, rows_per_forward=size, pad_id=pad_id)
    else:
        losses, counts = losses_and_counts(model, counter, scored, rows_per_forward=size, pad_id=pad_id)
        routing = RoutingCounts(
            batch_idx=rows["batch_idx"].to_numpy(dtype=np.int64),
            in_batch_idx=rows["place"].to_numpy(dtype=np.int64),
            label=rows["label"].to_numpy(dtype=object),
            category=rows["category"].to_numpy(dtype=object),
            role=np.full(len(rows), "prompt", dtype=object),
            num_tokens=np.array([len(prompt) for prompt in prompts], dtype=np.int64),
            counts_NLE=counts,
            layers=counter.moe_layers.layers,
            num_experts_per_tok=counter.moe_layers.num_experts_per_tok,
        )
        routing.check()
    answered = rows.assign(
        answer=pd.Series([text for text, _ in answers], index=rows.index, dtype=object),
        ended=[ended for _, ended in answers],
        target_loss=losses,
        target_tokens=[len(ids) for ids in targets],
    )
    return answered, routing


def _losses_by_length(
    model: PreTrainedModel,
    rows: Sequence[TokenizedRow],
    *,
    rows_per_forward: int,
    pad_id: int,
    tokens_per_forward: int = _TOKENS_PER_FORWARD,
) -> list[float]:
    """`target_losses` in forward passes of rows of similar length; rows without an answer are not run and have 0."""
    losses = {id(row): 0.0 for row in rows}
    wanted = [row for row in rows if row.answer_ids]
    sizes = {"rows_per_forward": rows_per_forward, "tokens_per_forward": tokens_per_forward}
    for group in micro_batches(wanted, **sizes):
        found = target_losses(model, group, rows_per_forward=len(group), pad_id=pad_id)
        losses |= {id(row): loss for row, loss in zip(group, found, strict=True)}
    return [losses[id(row)] for row in rows]


def text_losses(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, rows_per_forward: int
) -> pd.DataFrame:
    """How well the model predicts plain texts: `text` (position), `loss` (summed nats) and `num_tokens` of each.

    No chat template is applied. A text's first token is context only. Texts longer than the model's positions or
    1,024 tokens are cut there.

    Args:
        model: in eval mode.
        tokenizer: its tokenizer.
        texts: plain text.
        rows_per_forward: texts run at once.
    """
    limit = min(_MAX_TEXT_TOKENS, getattr(model.config.get_text_config(), "max_position_embeddings", _MAX_TEXT_TOKENS))
    rows = []
    for text in texts:
        ids = list(tokenizer(text)["input_ids"])[:limit]
        rows.append(TokenizedRow(ids[:1], ids[1:]))
    losses = _losses_by_length(model, rows, rows_per_forward=rows_per_forward, pad_id=pad_token_id(tokenizer))
    sizes = [len(row.answer_ids) for row in rows]
    return pd.DataFrame({"text": range(len(rows)), "loss": losses, "num_tokens": sizes})
