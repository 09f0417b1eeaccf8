"""From messages to token ids: the tokenizer's chat template for prompts, plain text plus end-of-turn for answers.

Shape suffixes: B rows, S positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from moe_ray.chat_messages import Message
from moe_ray.errors import InputError
from moe_ray.models.template_spans import Span, content_spans

IGNORED = -100
"""Label of a position that the loss does not see."""

NOT_COUNTED, PROMPT, RESPONSE = -1, 0, 1
"""Role of a position: padding or a token left out of the counts, a prompt token, a response token."""

_BLANK_LINE = "\n\n"
"""Between the contents of messages where the tokenizer has no chat template."""


class TokenizedRow(NamedTuple):
    """One prompt and the answer that follows it, as token ids.

    Attributes:
        prompt_ids: token ids of the prompt.
        answer_ids: token ids of the answer; may be empty.
        counted: for each token, the prompt's and then the answer's, whether routing counts it; None = all are counted.
            It changes neither what the model sees nor what a loss is over.
        is_unsafe: whether the prompt is labelled unsafe; None = no label is known. Only training asks for it.
    """

    prompt_ids: list[int]
    answer_ids: list[int]
    counted: list[bool] | None = None
    is_unsafe: bool | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and answer."""
        return len(self.prompt_ids) + len(self.answer_ids)


@dataclass(frozen=True, kw_only=True)
class PaddedRows:
    """Rows of one forward pass, all shape (B, S).

    Attributes:
        input_ids_BS: token ids.
        attention_mask_BS: 1 = token, 0 = padding.
        labels_BS: the answer's ids; -100 elsewhere.
        roles_BS: 0 = prompt, 1 = response, -1 = padding or a token that is not counted.
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
        InputError: the prompt has no tokens, or the chat template refuses it.
    """
    ids = tokenizer(_render(tokenizer, messages), add_special_tokens=not tokenizer.chat_template)["input_ids"]
    if not ids:
        raise InputError(f"a prompt has no tokens: {str(messages)[:80]}; remove it")
    return list(ids)


def encode_row(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    response: str | None = None,
    *,
    complete: bool = True,
    template_tokens: bool = True,
) -> TokenizedRow:
    """One example as token ids, with the choice whether tokens of the chat template are counted.

    Args:
        tokenizer: its chat template is applied where there is one.
        messages: the prompt.
        response: the answer that follows; None or empty = none.
        complete: the response is a whole one, so the end-of-turn token follows it.
        template_tokens: count every token. Otherwise only tokens with at least one character of a message's content or
            of the response: not role headers, start tokens and what the template says by itself, nor the end-of-turn
            token after the response.

    Raises:
        InputError: the prompt has no tokens, or the chat template refuses it; without `template_tokens` also: no token
            comes from the messages, their contents cannot be located in what the template renders, or the tokenizer is
            a slow one, which does not say where tokens come from.
    """
    answer_ids = encode_answer(tokenizer, response, complete=complete) if response else []
    if template_tokens:
        return TokenizedRow(encode_prompt(tokenizer, messages), answer_ids)
    prompt_ids, counted = _encode_contents(tokenizer, messages)
    from_response = [True] * len(answer_ids)
    if answer_ids and complete and tokenizer.eos_token_id is not None:
        from_response[-1] = False
    return TokenizedRow(prompt_ids, answer_ids, counted + from_response)


def _encode_contents(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
    """The ids of `encode_prompt`, and which of them come from the messages' contents."""
    name = tokenizer.name_or_path or type(tokenizer).__name__
    advice = "set template_tokens=true to count every token of a prompt"
    if not tokenizer.is_fast:
        raise InputError(f"{name}: a slow tokenizer does not say which characters a token comes from; {advice}")
    try:
        text, spans = content_spans(lambda some: _render(tokenizer, some), messages)
    except InputError as error:
        raise InputError(f"chat template of {name}: {error}; {advice}") from error
    encoded = tokenizer(
        text,
        add_special_tokens=not tokenizer.chat_template,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
    )
    from_text = [not added for added in encoded["special_tokens_mask"]]
    counted = _tokens_within(encoded["offset_mapping"], from_text, spans, len(text))
    if not any(counted):
        raise InputError(f"a prompt has no token that comes from its messages: {str(messages)[:80]}; remove it")
    return list(encoded["input_ids"]), counted


def _tokens_within(
    offsets: Sequence[Span], from_text: Sequence[bool], spans: Sequence[Span], length: int
) -> list[bool]:
    """For each token whether it covers a character of a span; offsets may leave out the white space before a token."""
    inside = [0] * length
    for start, end in spans:
        inside[start:end] = [1] * (end - start)
    before = [0, *accumulate(inside)]
    counted, reached = [], 0
    for (start, end), is_text in zip(offsets, from_text, strict=True):
        first = min(start, reached) if start == end else start
        counted.append(is_text and before[end] > before[first])
        reached = end if is_text else reached
    return counted


def _render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> str:
    """The text that the model is asked to continue."""
    if not tokenizer.chat_template:
        return _BLANK_LINE.join(message["content"] for message in messages)
    from jinja2 import TemplateError  # comes with chat templates, which a core without them does not need

    try:
        text: str = tokenizer.apply_chat_template(
            [dict(message) for message in messages], add_generation_prompt=True, tokenize=False
        )
    except TemplateError as error:
        raise InputError(
            f"the chat template of {tokenizer.name_or_path or type(tokenizer).__name__} refuses a prompt: {error}: "
            f"{str(messages)[:80]}; change the prompt or remove it"
        ) from error
    return text


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
    length = max(row.num_tokens for row in rows)
    shape = (len(rows), length)
    input_ids_BS = torch.full(shape, pad_id, dtype=torch.long)
    attention_mask_BS = torch.zeros(shape, dtype=torch.long)
    labels_BS = torch.full(shape, IGNORED, dtype=torch.long)
    roles_BS = torch.full(shape, NOT_COUNTED, dtype=torch.long)
    for position, (prompt_ids, answer_ids, counted, _) in enumerate(rows):
        size = len(prompt_ids) + len(answer_ids)
        start = length - size if left else 0
        middle, end = start + len(prompt_ids), start + size
        input_ids_BS[position, start:end] = torch.tensor(prompt_ids + answer_ids)
        attention_mask_BS[position, start:end] = 1
        labels_BS[position, middle:end] = torch.tensor(answer_ids, dtype=torch.long)
        roles_BS[position, start:middle] = PROMPT
        roles_BS[position, middle:end] = RESPONSE
        if counted is not None:
            roles_BS[position, start:end].masked_fill_(~torch.tensor(counted, dtype=torch.bool), NOT_COUNTED)
    return PaddedRows(
        input_ids_BS=input_ids_BS, attention_mask_BS=attention_mask_BS, labels_BS=labels_BS, roles_BS=roles_BS
    )
