"""Examples: one prompt with its label, category and target, read from the files and tables people have.

Rows are checked all at once, so that a file with ten faults is mended in one go. Prompts are untrusted text: they are
parsed as JSON or as a Python literal, never evaluated.
"""

from __future__ import annotations

import ast
import json
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Literal, TypedDict, cast, get_args

from moe_ray.chat_messages import Message, prompt_text
from moe_ray.config.values import shortened
from moe_ray.errors import InputError
from moe_ray.prompts.example_sources import Found, Record, Source, name_of, records_of
from moe_ray.prompts.faults import Faults
from moe_ray.prompts.recognition import Naming, read_records
from moe_ray.prompts.repeated_ids import RepeatedIds

Label = Literal["safe", "unsafe"]

Split = Literal["train", "validation", "test"]

LABELS: tuple[Label, ...] = get_args(Label)
SPLITS: tuple[Split, ...] = get_args(Split)

PairedRecords = Literal["pair", "goal", "attack"]

_LONGEST_TEXT_SHOWN = 40


@dataclass(frozen=True, kw_only=True)
class Example:
    """One prompt.

    Attributes:
        id: unique in a run.
        messages: chat messages, each with `role` and `content`; the last one is not the assistant's.
        label: `safe` or `unsafe`.
        category: empty where the source has none.
        response: an answer whose tokens may be counted; None where the source has none.
        target: the answer to train towards; None where the source has none.
        target_complete: whether the target ends the turn; False for an answer cut off at a length.
        pair: the same text on the two examples of a pair, which share a batch; None for single examples.
        split: None where the source does not say.
        topic: what it is about, whatever its label; empty where the source does not say.
        template: the wording or jailbreak around the request; empty where the source does not say.
    """

    id: str
    messages: tuple[Message, ...]
    label: Label
    category: str = ""
    response: str | None = None
    target: str | None = None
    target_complete: bool = True
    pair: str | None = None
    split: Split | None = None
    topic: str = ""
    template: str = ""

    def __repr__(self) -> str:
        text = prompt_text(self.messages)
        if len(text) > _LONGEST_TEXT_SHOWN:
            text = text[: _LONGEST_TEXT_SHOWN - 1] + "…"
        # `ascii` escapes what prompts may carry to a terminal: control and bidirectional characters, line breaks.
        about = ", ".join(filter(None, [self.label, self.category, ascii(text).replace("\\u2026", "…")]))
        return f"Example({self.id!r}, {about})"


class _Shared(TypedDict):
    """What every example of a record has alike."""

    category: str
    split: Split | None
    topic: str
    template: str


class _Fault(ValueError):
    """A fault of one field of one row."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(f"{name}: {message}")


def read_examples(
    source: Source,
    *,
    paired_records: PairedRecords = "pair",
    fields: Mapping[str, str] | None = None,
    labels: Mapping[str, str] | None = None,
    file_labels: Mapping[str, str] | None = None,
    found: list[Found] | None = None,
) -> list[Example]:
    """The examples of files or of a table, in their order; of two rows that are a pair, where the second one stands.

    Ids are `<file stem>:<id or number>`, `DataFrame:<id or row>` or `Dataset:<id or row>`, with `/safe` and `/unsafe` after
    it for the two sides of a pair. The number is the line of a JSONL file, or which record it is of a file of another form,
    counted from 1. Rows of tables count from 0. Files with equal stems have their folders before it.

    Args:
        source: a CSV, TSV, JSONL, JSON or Parquet file, a list of such files, a pandas DataFrame, or a `datasets.Dataset`. A
            file is a path, a pattern with `*`, or a URL that fsspec reads, such as `hf://datasets/NAME/FILE`.
        paired_records: what a `goal` + `all_prompt` record gives: `pair`, the bare goal as safe and the attack as
            unsafe; `goal` or `attack`, only that text, labelled unsafe.
        fields: our names to columns, see `prompts.fields`.
        labels: values to `safe` or `unsafe`, see `prompts.labels`.
        file_labels: parts of file names to `safe` or `unsafe`, see `prompts.file_labels`.
        found: gets an entry for each table: what form it is of, and how many rows and examples it has.

    Raises:
        InputError: a file is missing or unreadable, or rows are wrong; every wrong row is named with its location and field.
        OutsideFailed: a remote file cannot be read now.
    """
    naming = Naming(fields=fields or {}, labels=labels or {}, file_labels=file_labels or {})
    examples: list[Example] = []
    faults, ids = Faults(), RepeatedIds()
    for made in examples_of_records(read_records(source, naming, found), faults, paired_records):
        examples += made
        for example in made:
            ids.add(example.id)
    faults.add_repeated(examples[position].id for position in ids.repeated())
    faults.check()
    if not examples:
        raise InputError(f"no examples in {name_of(source)}; expected rows with `prompt` and `label`")
    return examples


def examples_of_records(
    records: Iterable[Record], faults: Faults, paired_records: PairedRecords
) -> Iterator[list[Example]]:
    """The examples of each record in turn; a record that is wrong gives none, and a fault.

    A record with the field `pair` waits for the first one of the other label that has the same; what waits for none to the
    end is no pair.

    Args:
        records: from `read_records`.
        faults: gets what is wrong.
        paired_records: as in `read_examples`.
    """
    waiting: dict[str, deque[Example]] = {}
    for record in records:
        try:
            made = _to_examples(record, paired_records)
            _check_characters(made)
        except _Fault as fault:
            faults.add(f"{record.location}: {fault}")
            continue
        if record.found is not None:
            record.found.unsafe += sum(one.label == "unsafe" for one in made)
            record.found.safe += sum(one.label == "safe" for one in made)
        if len(made) == 1 and made[0].pair is not None:
            made = _matched(made[0], waiting.setdefault(made[0].pair, deque()))
        if record.found is not None:
            record.found.pairs += len(made) == 2
        if made:
            yield made
    for alone in chain.from_iterable(waiting.values()):
        yield [replace(alone, pair=None)]


def _matched(example: Example, waiting: deque[Example]) -> list[Example]:
    """The example with its partner before it; nothing where it waits itself."""
    if not waiting or waiting[0].label == example.label:
        waiting.append(example)
        return []
    partner = waiting.popleft()
    return [replace(partner, pair=partner.id), replace(example, pair=partner.id)]


def records_to_examples(records: Sequence[Mapping[str, Any]], *, source: str = "records") -> list[Example]:
    """Examples from dictionaries with the same fields as a file's rows."""
    return [example for record in records_of(records, source) for example in _to_examples(record, "pair")]


def _to_examples(record: Record, paired_records: PairedRecords) -> list[Example]:
    fields = record.fields
    name = f"{record.source}:{_id(fields, record.number)}"
    shared: _Shared = {
        "category": _level(fields, "category"),
        "split": _split(fields),
        "topic": _level(fields, "topic"),
        "template": _level(fields, "template"),
    }
    if "goal" in fields or "all_prompt" in fields:
        goal = (_user(_required_text(fields, "goal")),)
        attack = _messages(fields.get("all_prompt"), "all_prompt") if paired_records != "goal" else goal
        if paired_records == "pair":
            return [
                Example(id=f"{name}/safe", messages=goal, label="safe", pair=name, **shared),
                Example(id=f"{name}/unsafe", messages=attack, label="unsafe", pair=name, **shared),
            ]
        messages = goal if paired_records == "goal" else attack
        return [Example(id=name, messages=messages, label="unsafe", target=_text(fields, "target"), **shared)]
    if "messages" in fields:
        messages = _messages(fields["messages"], "messages")
    else:
        messages = (_user(_required_text(fields, "prompt")),)
    response, target = _text(fields, "response"), _text(fields, "target")
    label = _label(fields)
    pair = _text(fields, "pair") or None
    return [Example(id=name, messages=messages, label=label, response=response, target=target, pair=pair, **shared)]


def _check_characters(examples: Iterable[Example]) -> None:
    for one in examples:
        texts = (one.id, one.category, one.response, one.target, one.topic, one.template)
        spoken = (text for message in one.messages for text in message.values())
        try:
            for text in (*texts, *spoken):
                (text or "").encode()
        except UnicodeEncodeError as error:
            what = "a text has half of a surrogate pair, such as \\ud83d alone, which is no character"
            raise _Fault("record", f"{what}; mend or remove it") from error


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _id(fields: Mapping[str, Any], number: int) -> str:
    """What the source calls the record; its number where it says nothing."""
    value = number if fields.get("id") is None else fields["id"]
    if isinstance(value, bool) or not isinstance(value, (str, int, float)) or value != value:
        raise _Fault("id", f"got {type(value).__name__} {shortened(value)}, expected text or a number")
    return str(value)


def _text(fields: Mapping[str, Any], name: str) -> str | None:
    value = fields.get(name)
    if value is not None and not isinstance(value, str):
        raise _Fault(name, f"got {type(value).__name__}, expected text")
    return value


def _level(fields: Mapping[str, Any], name: str) -> str:
    """A name or a number that prompts of one kind share; empty where there is none."""
    value = fields.get(name)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return _text(fields, name) or ""


def _required_text(fields: Mapping[str, Any], name: str) -> str:
    value = _text(fields, name)
    if value is None:
        raise _Fault(name, f"missing; got fields {', '.join(sorted(fields))[:200] or 'none'}")
    if not value.strip():
        raise _Fault(name, "empty")
    return value


def _label(fields: Mapping[str, Any]) -> Label:
    value = fields.get("label")
    if value not in LABELS:
        if "label" not in fields:
            raise _Fault("label", "missing")
        raise _Fault("label", f"got {shortened(value)}, expected 'safe' or 'unsafe', or set prompts.labels")
    return cast(Label, value)


def _split(fields: Mapping[str, Any]) -> Split | None:
    value = fields.get("split")
    if value is not None and value not in SPLITS:
        raise _Fault("split", f"got {shortened(value)}, expected 'train', 'validation' or 'test'")
    return cast("Split | None", value)


def _messages(value: Any, name: str) -> tuple[Message, ...]:
    """Chat messages from text, from a list of messages or from such a list written as a string."""
    if isinstance(value, str):
        parsed = _parse_list(value)
        value = [_user(value)] if parsed is None and value.strip() else parsed
    if not isinstance(value, list) or not value:
        raise _Fault(name, "expected text or a non-empty list of messages")
    for message in value:
        content = message.get("content") if isinstance(message, dict) else None
        if not isinstance(content, str) or not isinstance(message.get("role"), str):
            raise _Fault(name, f"got {shortened(message)}, expected messages with text `role` and `content`")
    messages = tuple({"role": message["role"], "content": message["content"]} for message in value)
    if messages[-1]["role"] == "assistant":
        raise _Fault(name, "the last message is the assistant's; put the answer in `response` or `target`")
    if not any(message["content"].strip() for message in messages):
        raise _Fault(name, "every message is empty")
    return messages


def _parse_list(text: str) -> list[Any] | None:
    """The list that `text` writes in JSON or as a Python literal; None when it is just text."""
    if not text.lstrip().startswith("["):
        return None
    for parse in (json.loads, ast.literal_eval):
        try:
            value = parse(text.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
        if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            return value
    return None
