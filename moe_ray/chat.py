"""From messages to token ids: the tokenizer's chat template for prompts, plain text plus end-of-turn for answers.

Shape suffixes: B rows, S positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from moe_ray.errors import InputError
from moe_ray.examples import Message

IGNORED = -100
"""Label of a position that the loss does not see."""

NOT_COUNTED, PROMPT, RESPONSE = -1, 0, 1
"""Role of a position: padding, a prompt token, a response token."""


class TokenizedRow(NamedTuple):
    """Token ids of one prompt and of the answer that follows it (may be empty)."""

    prompt_ids: list[int]
    answer_ids: list[int]


@dataclass(frozen=True, kw_only=True)
class PaddedRows:
    """Rows of one forward pass, all shape (B, S).

    Attributes:
        input_ids_BS: token ids.
        attention_mask_BS: 1 = token, 0 = padding.
        labels_BS: the answer's ids; -100 elsewhere.
        roles_BS: 0 = prompt, 1 = response, -1 = padding.
    """

    input_ids_BS: torch.Tensor
    attention_mask_BS: torch.Tensor
    labels_BS: torch.Tensor
    roles_BS: torch.Tensor

    def to(self, device: torch.device | str) -> PaddedRows:
        """The same rows on another device."""
        return PaddedRows(**{name: tensor.to(device) for name, tensor in vars(self).items()})


def encode_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    """Token ids of the messages up to the point where the assistant answers.

    A tokenizer without a chat template gets the messages' contents, a blank line between them.

    Raises:
        InputError: the prompt has no tokens.
    """
    if tokenizer.chat_template:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in messages], add_generation_prompt=True, tokenize=False
        )
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    else:
        ids = tokenizer("\n\n".join(message["content"] for message in messages))["input_ids"]
    if not ids:
        raise InputError(f"a prompt has no tokens: {str(messages)[:80]}; remove it")
    return list(ids)


def encode_answer(tokenizer: PreTrainedTokenizerBase, text: str, *, complete: bool = True) -> list[int]:
    """Token ids of an answer; a complete one ends with the end-of-turn token."""
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    if complete and tokenizer.eos_token_id is not None:
        ids.append(tokenizer.eos_token_id)
    return ids


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that fills padding; which one is irrelevant, since padding is masked everywhere."""
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if candidate is not None:
            return int(candidate)
    return 0


def pad_rows(rows: Sequence[TokenizedRow], *, pad_id: int, left: bool = False) -> PaddedRows:
    """Rows padded to the longest of them.

    Args:
        rows: at least one.
        pad_id: token id that fills padding.
        left: pad on the left, as generation needs.
    """
    length = max(len(row.prompt_ids) + len(row.answer_ids) for row in rows)
    shape = (len(rows), length)
    input_ids_BS = torch.full(shape, pad_id, dtype=torch.long)
    attention_mask_BS = torch.zeros(shape, dtype=torch.long)
    labels_BS = torch.full(shape, IGNORED, dtype=torch.long)
    roles_BS = torch.full(shape, NOT_COUNTED, dtype=torch.long)
    for position, (prompt_ids, answer_ids) in enumerate(rows):
        size = len(prompt_ids) + len(answer_ids)
        start = length - size if left else 0
        middle, end = start + len(prompt_ids), start + size
        input_ids_BS[position, start:end] = torch.tensor(prompt_ids + answer_ids)
        attention_mask_BS[position, start:end] = 1
        labels_BS[position, middle:end] = torch.tensor(answer_ids, dtype=torch.long)
        roles_BS[position, start:middle] = PROMPT
        roles_BS[position, middle:end] = RESPONSE
    return PaddedRows(
        input_ids_BS=input_ids_BS, attention_mask_BS=attention_mask_BS, labels_BS=labels_BS, roles_BS=roles_BS
    )
