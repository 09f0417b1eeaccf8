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
from moe_ray.models.chat_template import answer_form, render
from moe_ray.models.sending import sent
from moe_ray.models.template_spans import Span, content_spans
from moe_ray.models.thoughts import split_thought, without_opening, without_thought

IGNORED = -100
"""Label of a position that the loss does not see."""

NOT_COUNTED, PROMPT, RESPONSE, THOUGHT = -1, 0, 1, 2
"""Role of a position: padding or a token left out of the counts, a prompt token, a response token, a token of the thought
between them."""


class TokenizedRow(NamedTuple):
    """One prompt and the answer that follows it, as token ids.

    Attributes:
        prompt_ids: token ids of what the answer follows: the prompt, and the thought where there is one.
        answer_ids: token ids of the answer; may be empty.
        counted: for each token, the prompt's and then the answer's, whether routing counts it; None = all are counted.
            It changes neither what the model sees nor what a loss is over.
        is_unsafe: whether the prompt is labelled unsafe; None = no label is known. Only training asks for it.
        num_thought: how many of the last `prompt_ids` are the thought's, or what the chat template writes in its place. No
            loss is over them.
    """

    prompt_ids: list[int]
    answer_ids: list[int]
    counted: list[bool] | None = None
    is_unsafe: bool | None = None
    num_thought: int = 0

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
        roles_BS: 0 = prompt, 1 = response, 2 = thought, -1 = padding or a token that is not counted.
    """

    input_ids_BS: torch.Tensor
    attention_mask_BS: torch.Tensor
    labels_BS: torch.Tensor
    roles_BS: torch.Tensor

    def to(self, device: torch.device | str) -> PaddedRows:
        """The same rows on another device."""
        return PaddedRows(**{name: sent(tensor, device) for name, tensor in vars(self).items()})


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, after_thought: bool = False
) -> list[int]:
    """Token ids of the messages up to the point where the assistant answers.

    A tokenizer without a chat template gets the messages' contents, a blank line between them.

    Args:
        tokenizer: its chat template is applied where there is one.
        messages: the prompt.
        after_thought: up to the point where the answer itself begins, without a thought; see `answer_form`.

    Raises:
        InputError: the prompt has no tokens, or the chat template refuses it.
    """
    ids = list(tokenizer(render(tokenizer, messages), add_special_tokens=not tokenizer.chat_template)["input_ids"])
    if not ids:
        raise InputError(f"a prompt has no tokens: {str(messages)[:80]}; remove it")
    return ids + answer_opening_ids(tokenizer) if after_thought else ids


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
    counted: list[bool] | None = None
    if template_tokens:
        prompt_ids = encode_prompt(tokenizer, messages)
    else:
        prompt_ids, counted = _encode_contents(tokenizer, messages)
    thought, answer = _parts(tokenizer, response) if response else ("", "")
    thought_ids = _plain_ids(tokenizer, thought)
    answer_ids = encode_answer(tokenizer, answer, complete=complete) if answer else []
    if counted is not None:
        is_said = bool(thought_ids) and thought != answer_form(tokenizer).opening
        from_response = [True] * len(answer_ids)
        if answer_ids and complete and tokenizer.eos_token_id is not None:
            from_response[-1] = False
        counted += [is_said] * len(thought_ids) + from_response
    return TokenizedRow(prompt_ids + thought_ids, answer_ids, counted, num_thought=len(thought_ids))


def encode_target(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    target: str | None,
    *,
    complete: bool = True,
    is_unsafe: bool | None = None,
) -> TokenizedRow:
    """A prompt with an answer to train or score towards, which is never a thought.

    A thought in the target is left out. Where the prompt opens one, or the chat template writes an empty one or names a
    channel before an answer, that stands before the target as the template writes it, and no loss is over it.

    Args:
        tokenizer: its chat template is applied where there is one.
        messages: the prompt.
        target: the answer; None or empty = none.
        complete: the target is a whole answer, so the end-of-turn token follows it.
        is_unsafe: the prompt's label, where it matters.
    """
    opening_ids = answer_opening_ids(tokenizer)
    answer_ids = target_ids(tokenizer, target, complete=complete) if target else []
    prompt_ids = encode_prompt(tokenizer, messages) + opening_ids
    return TokenizedRow(prompt_ids, answer_ids, is_unsafe=is_unsafe, num_thought=len(opening_ids))


def answer_opening_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of what stands between a prompt and an answer without a thought, see `answer_form`; often none."""
    return _plain_ids(tokenizer, answer_form(tokenizer).opening)


def _parts(tokenizer: PreTrainedTokenizerBase, response: str) -> tuple[str, str]:
    """The text between the prompt and the answer, and the answer; no answer where the thought is unclosed."""
    form, split = answer_form(tokenizer), split_thought(response)
    thought = response[: split.start]
    if not thought.strip():
        return form.opening, response
    return (without_opening(thought) if form.is_open else thought), split.answer


def _encode_contents(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
    """The ids of `encode_prompt`, and which of them come from the messages' contents."""
    name = tokenizer.name_or_path or type(tokenizer).__name__
    advice = "set template_tokens=true to count every token of a prompt"
    if not tokenizer.is_fast:
        raise InputError(f"{name}: a slow tokenizer does not say which characters a token comes from; {advice}")
    try:
        text, spans = content_spans(lambda some: render(tokenizer, some), messages)
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


def encode_answer(tokenizer: PreTrainedTokenizerBase, text: str, *, complete: bool = True) -> list[int]:
    """Token ids of an answer as it stands; a complete one ends with the end-of-turn token.

    A text that may have a thought before its answer is split first, as `encode_row` and `target_ids` do: split twice, an
    answer that speaks of the marks of thoughts would lose what stands before them.
    """
    ids = _plain_ids(tokenizer, text)
    if complete and tokenizer.eos_token_id is not None:
        ids.append(tokenizer.eos_token_id)
    return ids


def target_ids(tokenizer: PreTrainedTokenizerBase, target: str, *, complete: bool = True) -> list[int]:
    """Token ids of a target without its thought; a complete one ends with the end-of-turn token.

    Where the thought is unclosed there is no answer, and no token; see `refuse_targets_without_answer`.
    """
    answer = without_thought(target)
    return encode_answer(tokenizer, answer, complete=complete) if answer or not target else []


def _plain_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []


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
    for position, (prompt_ids, answer_ids, counted, _, num_thought) in enumerate(rows):
        size = len(prompt_ids) + len(answer_ids)
        start = length - size if left else 0
        middle, end = start + len(prompt_ids), start + size
        input_ids_BS[position, start:end] = torch.tensor(prompt_ids + answer_ids)
        attention_mask_BS[position, start:end] = 1
        labels_BS[position, middle:end] = torch.tensor(answer_ids, dtype=torch.long)
        roles_BS[position, start:middle] = PROMPT
        roles_BS[position, middle - num_thought : middle] = THOUGHT
        roles_BS[position, middle:end] = RESPONSE
        if counted is not None:
            roles_BS[position, start:end].masked_fill_(~torch.tensor(counted, dtype=torch.bool), NOT_COUNTED)
    return PaddedRows(
        input_ids_BS=input_ids_BS, attention_mask_BS=attention_mask_BS, labels_BS=labels_BS, roles_BS=roles_BS
    )
