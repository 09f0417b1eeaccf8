"""Quarantine: examples that cannot be captured, each with its reason, so that the rest can.

A quarantined example is out of its batch for every later stage: its batch has fewer examples in identification, in the
pandas export and in training. A batch that loses all examples of a label has no mask and is not trained.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
from transformers import PreTrainedTokenizerBase

from moe_ray.artifacts import Folder
from moe_ray.chat import TokenizedRow, encode_row
from moe_ray.count_parts import BATCHES
from moe_ray.errors import InputError

QUARANTINE = "quarantine.parquet"
TRUNCATED = "truncated.parquet"
COLUMNS = ("batch_idx", "in_batch_idx", "id", "label", "category", "reason", "detail")

EMPTY = "empty"
NOT_ENCODED = "not_encoded"
TOO_LONG = "too_long"
OUT_OF_MEMORY = "out_of_memory"
FORWARD_FAILED = "forward_failed"
PROCESS_DIED = "process_died"

TooLong = Literal["skip", "truncate", "error"]


class Rejected(NamedTuple):
    """Why an example cannot be captured: one of the reasons above, and a sentence."""

    reason: str
    detail: str


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
    length = len(row.prompt_ids) + len(row.answer_ids)
    if limit is None or length <= limit:
        return Encoded(row)
    said = f"{length} tokens, expected at most {limit}"
    if too_long == "error":
        raise InputError(f"an example is too long: {said}; set capture.too_long to skip or truncate, or remove it")
    if too_long == "skip":
        return Rejected(TOO_LONG, said)
    row = _truncated(row, limit)
    if row.counted is not None and not any(row.counted):
        return Rejected(TOO_LONG, f"{said}; the first {limit} are all of the chat template")
    return Encoded(row, length)


def _truncated(row: TokenizedRow, limit: int) -> TokenizedRow:
    """The first `limit` tokens of a row."""
    prompt_ids = row.prompt_ids[:limit]
    counted = None if row.counted is None else row.counted[:limit]
    return TokenizedRow(prompt_ids, row.answer_ids[: limit - len(prompt_ids)], counted)


def rejected_row(example: Mapping[str, Any], rejected: Rejected) -> dict[str, Any]:
    """A row of the quarantine table."""
    return {
        **{name: example[name] for name in COLUMNS[:5]},
        "reason": rejected.reason,
        "detail": rejected.detail,
    }


def quarantine_frame(rows: Sequence[Mapping[str, Any]] | pd.DataFrame) -> pd.DataFrame:
    """Rows of `rejected_row` as a table with fixed types, ordered by batch and place, each example once."""
    frame = pd.DataFrame(rows, columns=list(COLUMNS))
    types = {name: "int64" if name.endswith("_idx") else "object" for name in COLUMNS}
    keys = ["batch_idx", "in_batch_idx"]
    return frame.astype(types).drop_duplicates(keys).sort_values(keys, ignore_index=True)


def without_quarantined(examples: pd.DataFrame, quarantined: pd.DataFrame) -> pd.DataFrame:
    """The examples that are not in quarantine, in their order."""
    keys = ["batch_idx", "in_batch_idx"]
    out = pd.MultiIndex.from_frame(examples[keys]).isin(pd.MultiIndex.from_frame(quarantined[keys]))
    return examples[np.logical_not(out)]


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
    for place, name, messages in zip(examples.index, examples["id"], examples["messages"], strict=True):
        try:
            encoded = encode_example(tokenizer, messages, None, limit=limit, too_long=policy)
        except InputError as error:
            raise InputError(f"{name}: {error}") from error
        if isinstance(encoded, Rejected):
            found[place] = encoded
    return found


def read_training_examples(batches: Folder, routing: Folder | None) -> pd.DataFrame:
    """The stored examples of all batches that can be trained on: not in quarantine, and with a target.

    An example without a target is one that was too long to be answered and was counted in part.

    Args:
        batches: folder of the `batches` stage.
        routing: folder of the finished capture; None = nothing is in quarantine.
    """
    examples = batches.read_frame(BATCHES)
    if routing is None:
        return examples
    kept = without_quarantined(examples, routing.read_frame(QUARANTINE))
    no_target = kept[kept["target"].isna()]
    if no_target.empty:
        return kept
    cut = no_target[~no_target.index.isin(without_quarantined(no_target, routing.read_frame(TRUNCATED)).index)]
    return kept.drop(index=cut.index)


def describe_reasons(reasons: Mapping[str, int]) -> str:
    """`2 too_long, 1 empty`, the most frequent first."""
    ordered = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count} {reason}" for reason, count in ordered)


def describe_capture(notes: Mapping[str, Any]) -> str:
    """What a capture counted and what it left out, in words."""
    text = f"{notes['tokens']:,} tokens of {notes['examples'] - notes['quarantined']} examples counted"
    if notes["padding_share"] is not None:
        text += f"; {notes['padding_share']:.1%} of the tokens in forward passes were padding"
    if notes["quarantined"]:
        reasons = describe_reasons(notes["reasons"])
        text += f"\n{notes['quarantined']} examples in quarantine ({reasons}), see routing/{QUARANTINE}"
    if notes["truncated"]:
        text += f"\n{notes['truncated']} examples were cut to the longest allowed length, see routing/{TRUNCATED}"
    return text


def describe_lost(batches: Sequence[int]) -> str:
    """Which batches have no mask, and why."""
    return (
        f"{len(batches)} batches have no counted tokens of one label, because its examples are in quarantine or have no "
        f"tokens in selection.roles; they get no mask and are not trained: {list(batches[:20])}"
    )
