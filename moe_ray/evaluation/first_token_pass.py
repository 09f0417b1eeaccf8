"""The forward passes behind `first_token`: the probabilities of the first answer token.

Shape suffixes: B rows, S positions, V vocabulary, K kept tokens.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moe_ray.errors import InputError
from moe_ray.evaluation.first_token import COLUMNS, KEPT
from moe_ray.models.token_budget import TokenBudget
from moe_ray.models.tokenization import TokenizedRow, encode_prompt, pad_rows, pad_token_id


def first_token_table(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: pd.DataFrame,
    *,
    budget: TokenBudget,
    at: pd.DataFrame | None = None,
) -> pd.DataFrame:
    """What the model would say first to each prompt, under natural routing: a row each with `COLUMNS`.

    Args:
        model: in eval mode.
        tokenizer: its tokenizer.
        rows: with `id` and `messages` (JSON).
        budget: of tokens that run at once.
        at: a table of another model, whose tokens are looked at; None = the likeliest of this one.

    Raises:
        InputError: `at` has no row for an example, or a prompt does not fit in memory.
    """
    if at is not None and not rows["id"].isin(at["id"]).all():
        raise InputError("before and after hold answers to different examples; evaluate both on the same ones")
    prompts = [encode_prompt(tokenizer, json.loads(text)) for text in rows["messages"]]
    chosen = None if at is None else at.set_index("id")["token_ids"].loc[rows["id"]].tolist()
    pad_id = pad_token_id(tokenizer)
    table: list[dict[str, object]] = [{}] * len(rows)
    ids = rows["id"].tolist()

    def work(group: list[int]) -> Tensor:
        with torch.inference_mode():
            return _next_token_log_probs(model, [prompts[index] for index in group], pad_id)

    for group, log_probs_BV in budget.run_all([len(prompt) for prompt in prompts], work):
        for index, log_probs_V in zip(group, log_probs_BV, strict=True):
            tokens = None if chosen is None else torch.as_tensor(np.array(chosen[index]), dtype=torch.long)
            table[index] = dict(zip(COLUMNS, (ids[index], *_kept(log_probs_V, tokens)), strict=True))
    return pd.DataFrame(table, columns=list(COLUMNS))


def _next_token_log_probs(model: PreTrainedModel, prompts: Sequence[list[int]], pad_id: int) -> Tensor:
    """(B, V) log probabilities of the token after each prompt, float32."""
    padded = pad_rows([TokenizedRow(prompt, []) for prompt in prompts], pad_id=pad_id).to(model.device)
    lengths_B = torch.tensor([len(prompt) for prompt in prompts], device=model.device)
    first = int(lengths_B.min())
    keep = padded.input_ids_BS.shape[1] - first + 1
    output = model(
        input_ids=padded.input_ids_BS,
        attention_mask=padded.attention_mask_BS,
        use_cache=False,
        logits_to_keep=keep,
    )
    logits_BSV = output.logits[:, -keep:]
    rows_B = torch.arange(len(prompts), device=model.device)
    return torch.log_softmax(logits_BSV[rows_B, lengths_B - first].float(), dim=-1)


def _kept(log_probs_V: Tensor, tokens_K: Tensor | None) -> tuple[np.ndarray, np.ndarray, float]:
    """The tokens looked at, their log probabilities, and that of all others together."""
    log_probs_V = log_probs_V.cpu()
    if tokens_K is None:
        tokens_K = log_probs_V.topk(min(KEPT, len(log_probs_V))).indices
    others_V = torch.ones(len(log_probs_V), dtype=torch.bool)
    others_V[tokens_K] = False
    rest = torch.logsumexp(log_probs_V[others_V].double(), dim=0).item() if others_V.any() else -np.inf
    return tokens_K.numpy().astype(np.int32), log_probs_V[tokens_K].numpy(), float(rest)
