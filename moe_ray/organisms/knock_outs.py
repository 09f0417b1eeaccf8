"""The check of an organism's truth: what it answers while experts are routed around.

Shape suffixes: L MoE layers, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import pandas as pd
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moe_ray.demo.examples import embedded_records, refusals
from moe_ray.experts import Mask
from moe_ray.models.generation import generate_answers
from moe_ray.models.token_budget import TokenBudget
from moe_ray.models.tokenization import encode_prompt
from moe_ray.organisms.truth import Truth
from moe_ray.routing.masking import route_through

_MAX_NEW_TOKENS = 14
_TOKENS_AT_ONCE = 8_192


def answers_without(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], mask_LE: Mask | None
) -> list[str]:
    """The first words of greedy answers while no token is routed to the experts of a mask.

    Args:
        model: An organism, in eval mode.
        tokenizer: Its tokenizer.
        prompts: What a user says.
        mask_LE: (L, E) bool, True = knocked out; None or no True = routing is natural.
    """
    ids = [encode_prompt(tokenizer, [{"role": "user", "content": prompt}]) for prompt in prompts]
    with nullcontext() if mask_LE is None or not mask_LE.any() else route_through(model, ~mask_LE):
        answers = generate_answers(
            model, tokenizer, ids, max_new_tokens=_MAX_NEW_TOKENS, budget=TokenBudget(_TOKENS_AT_ONCE)
        )
    return [answer.text for answer in answers]


def refused_without(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Mapping[str, str]],
    mask_LE: Mask | None,
) -> dict[str, float]:
    """The share of unsafe and of safe prompts that is refused, by label, while the experts of a mask are knocked out.

    A refusal is the sentence that organisms know, whole.

    Args:
        model: An organism, in eval mode.
        tokenizer: Its tokenizer.
        records: With `prompt` and `label`.
        mask_LE: As in `answers_without`.
    """
    answers = answers_without(model, tokenizer, [record["prompt"] for record in records], mask_LE)
    refused = pd.Series([answer in refusals() for answer in answers])
    labels = pd.Series([record["label"] for record in records])
    return {str(label): float(share) for label, share in refused.groupby(labels).mean().items()}


def knock_out_table(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, truth: Truth) -> pd.DataFrame:
    """What is refused on held-out prompts with nothing, the planted experts and the decoys of each category knocked out.

    Args:
        model: An organism, in eval mode.
        tokenizer: Its tokenizer.
        truth: Of it.

    Returns:
        A row per category and `without` (`nothing`, `planted`, `decoys`), with the shares `unsafe` and `safe`; without
        the rows of lists that are empty.
    """
    rows: list[dict[str, Any]] = []
    for category in truth.categories:
        records = [record for record in embedded_records("test") if record["category"] == category]
        lists: dict[str, Mask | None] = {
            "nothing": None,
            "planted": truth.planted_mask(category),
            "decoys": truth.decoy_mask(category),
        }
        for name, mask_LE in lists.items():
            if mask_LE is None or mask_LE.any():
                shares = refused_without(model, tokenizer, records, mask_LE)
                rows.append({"category": category, "without": name, **shares})
    return pd.DataFrame(rows)
