"""What a split is fitted on and measured with: prompts with the dense model's own answers, and neutral text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moe_ray.chat_messages import Message
from moe_ray.demo.examples import embedded_records
from moe_ray.models.generation import generate_responses
from moe_ray.models.loss import target_losses, text_losses
from moe_ray.models.token_budget import TokenBudget
from moe_ray.models.tokenization import TokenizedRow, encode_prompt, pad_token_id
from moe_ray.prompts.neutral_texts import neutral_texts

MAX_NEW_TOKENS = 48
_PROMPTS_AT_ONCE = 24
_HELD_OUT_EVERY = 5
_EMBEDDED_EVERY = 11
_TOKENS_AT_ONCE = 2048


class NatsPerToken(NamedTuple):
    """How well a model predicts text it was not fitted on; `exp` of them is a perplexity.

    Attributes:
        neutral: on the neutral paragraphs that ship with moe-ray.
        answers: on the dense model's own answers to held-out prompts.
    """

    neutral: float
    answers: float

    def __sub__(self, other: NatsPerToken) -> NatsPerToken:
        return NatsPerToken(self.neutral - other.neutral, self.answers - other.answers)


def embedded_prompts() -> list[list[Message]]:
    """Prompts that ship with moe-ray, safe and unsafe ones alike: every eleventh of those to train on."""
    records = embedded_records("train")[::_EMBEDDED_EVERY]
    return [[{"role": "user", "content": record["prompt"]}] for record in records]


def own_answers(
    dense: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Sequence[Message]]
) -> tuple[list[TokenizedRow], list[TokenizedRow]]:
    """Prompts with what the model answers them, greedily: those to fit on, and every fifth held out.

    Args:
        dense: in evaluation mode.
        tokenizer: its tokenizer.
        prompts: chat messages of each.
    """
    encoded = [encode_prompt(tokenizer, messages) for messages in prompts]
    rows: list[TokenizedRow] = []
    for start in range(0, len(encoded), _PROMPTS_AT_ONCE):
        group = encoded[start : start + _PROMPTS_AT_ONCE]
        answers = generate_responses(dense, tokenizer, group, max_new_tokens=MAX_NEW_TOKENS)
        rows += [TokenizedRow(ids, answer.ids) for ids, answer in zip(group, answers, strict=True)]
    held_out = rows[_HELD_OUT_EVERY - 1 :: _HELD_OUT_EVERY]
    return [row for place, row in enumerate(rows, 1) if place % _HELD_OUT_EVERY], held_out


def nats_per_token(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, held_out: Sequence[TokenizedRow]
) -> NatsPerToken:
    """How well a model predicts neutral text and the answers of held-out rows, in nats per token.

    Args:
        model: in evaluation mode.
        tokenizer: its tokenizer.
        held_out: from `own_answers`; NaN for the answers where there are none.
    """
    budget = TokenBudget(_TOKENS_AT_ONCE)
    texts = text_losses(model, tokenizer, neutral_texts(), budget=budget)
    losses = target_losses(model, held_out, budget=budget, pad_id=pad_token_id(tokenizer))
    num_tokens = sum(len(row.answer_ids) for row in held_out)
    return NatsPerToken(
        neutral=float(texts["loss"].sum() / texts["num_tokens"].sum()),
        answers=sum(losses) / num_tokens if num_tokens else float("nan"),
    )
