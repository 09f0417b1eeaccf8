"""An example's token ids, or the reason why it cannot be counted."""

from __future__ import annotations

import json
from typing import Any, Literal, NamedTuple

import pandas as pd
from transformers import PreTrainedTokenizerBase

from moe_ray.errors import InputError
from moe_ray.models.tokenization import TokenizedRow, encode_row
from moe_ray.prompts.quarantine import EMPTY, NOT_ENCODED, TOO_LONG, Rejected

TooLong = Literal["skip", "truncate", "error"]


class Encoded(NamedTuple):
    """A row that can be captured; `full_length` is its length in tokens before it was cut, 0 where it was not."""

    row: TokenizedRow
    full_length: int = 0


def encode_example(
    tokenizer: PreTrainedTokenizerBase,
    messages: str,
    response: str | None,
    *,
    limit: int | None,
    too_long: TooLong = "skip",
    template_tokens: bool = True,
) -> Encoded | Rejected:
    """Token ids of one stored example, or why there are none.

    Args:
        tokenizer: its chat template is applied where there is one.
        messages: the example's messages as JSON.
        response: its answer; None or empty = none.
        limit: the longest row the model takes, in tokens; None = any.
        too_long: what becomes of a longer one: skip = rejected, truncate = cut to the first `limit` tokens.
        template_tokens: count tokens of the chat template too, see `encode_row`.

    Raises:
        InputError: it is too long and `too_long` is `error`.
    """
    parsed = json.loads(messages)
    if not any(str(message.get("content") or "").strip() for message in parsed):
        return Rejected(EMPTY, "no message has any text")
    try:
        row = encode_row(tokenizer, parsed, response, template_tokens=template_tokens)
    except (InputError, TypeError, KeyError, ValueError) as error:
        return Rejected(NOT_ENCODED, f"{type(error).__name__}: {str(error).strip()[:200]}")
    length = row.num_tokens
    if limit is None or length <= limit:
        return Encoded(row)
    message = f"{length} tokens, expected at most {limit}"
    if too_long == "error":
        raise InputError(f"an example is too long: {message}; set capture.too_long to skip or truncate, or remove it")
    if too_long == "skip":
        return Rejected(TOO_LONG, message)
    row = _truncated(row, limit)
    if row.counted is not None and not any(row.counted):
        return Rejected(TOO_LONG, f"{message}; the first {limit} are all of the chat template")
    return Encoded(row, length)


def _truncated(row: TokenizedRow, limit: int) -> TokenizedRow:
    """The first `limit` tokens of a row."""
    prompt_ids = row.prompt_ids[:limit]
    counted = None if row.counted is None else row.counted[:limit]
    num_thought = max(0, row.num_thought - (len(row.prompt_ids) - len(prompt_ids)))
    return TokenizedRow(prompt_ids, row.answer_ids[: limit - len(prompt_ids)], counted, num_thought=num_thought)


def unanswerable(
    examples: pd.DataFrame, tokenizer: PreTrainedTokenizerBase, *, limit: int | None, too_long: TooLong = "skip"
) -> dict[Any, Rejected]:
    """The examples whose prompts the model cannot be asked, by the frame's index.

    Args:
        examples: rows with `id` and `messages` (JSON).
        tokenizer: of the model.
        limit: the longest prompt the model takes, in tokens; None = any.
        too_long: `error` refuses a longer one; otherwise it cannot be asked, however much of it could be counted.

    Raises:
        InputError: a prompt is too long and `too_long` is `error`.
    """
    policy: TooLong = "error" if too_long == "error" else "skip"
    found = {}
    for index, name, messages in zip(examples.index, examples["id"], examples["messages"], strict=True):
        try:
            encoded = encode_example(tokenizer, messages, None, limit=limit, too_long=policy)
        except InputError as error:
            raise InputError(f"{name}: {error}") from error
        if isinstance(encoded, Rejected):
            found[index] = encoded
    return found
