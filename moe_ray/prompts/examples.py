"""Examples: one prompt with its label, category and target, read from the files people have.

Rows are checked all at once, so that a file with ten faults is mended in one go. Prompts are untrusted text: they are
parsed as JSON or as a Python literal, never evaluated.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypedDict, cast, get_args

from moe_ray.errors import InputError
from moe_ray.messages import Message

Label = Literal["safe", "unsafe"]

Split = Literal["train", "validation", "test"]

PairedRecords = Literal["pair", "goal", "attack"]

_MAX_FAULTS_SHOWN = 20


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


class _Record(NamedTuple):
    """A row as read, with where it was read."""

    path: Path
    line: int
    fields: dict[str, Any]


class _Shared(TypedDict):
    """What every example of a record has alike."""

    category: str
    split: Split | None


class _Fault(ValueError):
    """A fault of one field of one row."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(f"{name}: {message}")


def read_examples(paths: Sequence[str | Path], *, paired_records: PairedRecords = "pair") -> list[Example]:
    """The examples of JSONL, JSON and Parquet files, in file order.

    Ids are `<file stem>:<id or line>`, with `/safe` and `/unsafe` after it for the two sides of a pair.

    Args:
        paths: files.
        paired_records: what a `goal` + `all_prompt` record gives: `pair`, the bare goal as safe and the attack as
            unsafe; `goal` or `attack`, only that text, labelled unsafe.

    Raises:
        InputError: a file is missing or unreadable, or rows are wrong; every wrong row is named with file, line and
            field.
    """
    examples: list[Example] = []
    faults: list[str] = []
    for path in map(Path, paths):
        for record in _read_records(path):
            try:
                examples += _to_examples(record, paired_records)
            except _Fault as fault:
                faults.append(f"{path}:{record.line}: {fault}")
    faults += _duplicate_ids(examples)
    if faults:
        shown = "\n  ".join(faults[:_MAX_FAULTS_SHOWN])
        more = f"\n  … and {len(faults) - _MAX_FAULTS_SHOWN} more" if len(faults) > _MAX_FAULTS_SHOWN else ""
        raise InputError(f"{len(faults)} wrong rows; mend or remove them:\n  {shown}{more}")
    if not examples:
        raise InputError(f"no examples in {', '.join(map(str, paths))}; expected rows with `prompt` and `label`")
    return examples


def records_to_examples(records: Sequence[Mapping[str, Any]], *, source: str = "records") -> list[Example]:
    """Examples from dictionaries with the same fields as a file's rows."""
    rows = [_Record(Path(source), number, dict(record)) for number, record in enumerate(records, start=1)]
    return [example for row in rows for example in _to_examples(row, "pair")]


def _read_records(path: Path) -> Iterator[_Record]:
    if not path.is_file():
        raise InputError(f"prompts file {str(path)!r} does not exist; check prompts.files")
    readers = {".jsonl": _read_jsonl, ".json": _read_json, ".parquet": _read_parquet}
    if path.suffix not in readers:
        raise InputError(f"prompts file {str(path)!r}: got ending {path.suffix!r}, expected .jsonl, .json or .parquet")
    yield from readers[path.suffix](path)


def _read_jsonl(path: Path) -> Iterator[_Record]:
    for line, text in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if text.strip():
            yield _Record(path, line, _as_object(path, line, text))


def _as_object(path: Path, line: int, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{line}: not valid JSON ({error.msg} at column {error.colno})") from error
    return _check_object(path, line, value)


def _check_object(path: Path, line: int, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{path}:{line}: got a {type(value).__name__}, expected an object with named fields")
    return value


def _read_json(path: Path) -> Iterator[_Record]:
    """A JSON array of objects; each is decoded on its own so that its line is known."""
    text = path.read_text(encoding="utf-8")
    decoder, position = json.JSONDecoder(), len(text) - len(text.lstrip())
    if not text[position : position + 1] == "[":
        raise InputError(f"{path}: expected a JSON array of records; for one record a line use the ending .jsonl")
    position += 1
    while True:
        while position < len(text) and text[position] in " \t\r\n,":
            position += 1
        line = text.count("\n", 0, position) + 1
        if text[position : position + 1] == "]":
            return
        try:
            value, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}:{error.lineno}: not valid JSON ({error.msg})") from error
        yield _Record(path, line, _check_object(path, line, value))


def _read_parquet(path: Path) -> Iterator[_Record]:
    import pyarrow.parquet as pq

    try:
        rows = pq.read_table(path).to_pylist()
    except (OSError, ValueError) as error:
        raise InputError(f"prompts file {str(path)!r} cannot be read as Parquet: {error}") from error
    for line, row in enumerate(rows, start=1):
        yield _Record(path, line, {name: value for name, value in row.items() if value is not None})


def _to_examples(record: _Record, paired_records: PairedRecords) -> list[Example]:
    fields = record.fields
    name = f"{record.path.stem}:{fields.get('id', record.line)}"
    shared: _Shared = {"category": _text(fields, "category") or "", "split": _split(fields)}
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
    return [Example(id=name, messages=messages, label=label, response=response, target=target, **shared)]


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _text(fields: Mapping[str, Any], name: str) -> str | None:
    value = fields.get(name)
    if value is not None and not isinstance(value, str):
        raise _Fault(name, f"got {type(value).__name__}, expected text")
    return value


def _required_text(fields: Mapping[str, Any], name: str) -> str:
    value = _text(fields, name)
    if value is None:
        raise _Fault(name, f"missing; got fields {', '.join(sorted(fields)) or 'none'}")
    if not value.strip():
        raise _Fault(name, "empty")
    return value


def _label(fields: Mapping[str, Any]) -> Label:
    value = fields.get("label")
    if value not in get_args(Label):
        raise _Fault("label", f"got {value!r}, expected 'safe' or 'unsafe'" if "label" in fields else "missing")
    return cast(Label, value)


def _split(fields: Mapping[str, Any]) -> Split | None:
    value = fields.get("split")
    if value is not None and value not in get_args(Split):
        raise _Fault("split", f"got {value!r}, expected 'train', 'validation' or 'test'")
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
            raise _Fault(name, f"got {str(message)[:60]!r}, expected messages with text `role` and `content`")
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


def _duplicate_ids(examples: Sequence[Example]) -> list[str]:
    seen: set[str] = set()
    twice = []
    for example in examples:
        if example.id in seen:
            twice.append(f"{example.id}: id: used twice; ids must be unique within a file name")
        seen.add(example.id)
    return twice
