"""Rows of any table as rows of moe-ray's own form: by the columns that are named, or by a published form that fits."""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any

from moe_ray.errors import InputError
from moe_ray.prompts.example_sources import Found, Record, Source, Table, tables_of
from moe_ray.prompts.schemas import SCHEMAS, Schema

OWN_FORM = "moe-ray"
"""The form that `prompt` or `messages` with `label`, or `goal` with `all_prompt`, are known by."""

NAMED = "prompts.fields"
"""The form of a table whose columns the user names."""

_ROWS_LOOKED_AT = 50
_UNLABELLED, _REPEATED = "no label", "repeated request"


@dataclass(frozen=True, kw_only=True)
class Naming:
    """What the user says about columns and values; see the settings of these names in the section `prompts`.

    Attributes:
        fields: our names to columns.
        labels: values of the label's column to `safe` or `unsafe`.
        file_labels: words in a file's name to the label of all its rows.
    """

    fields: Mapping[str, str] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    file_labels: Mapping[str, str] = field(default_factory=dict)

    def label_of(self, value: Any) -> Any:
        """The label that a value stands for; the value itself where nothing is said of it."""
        return self._labels.get(_text(value).casefold(), value) if isinstance(value, (str, int, float)) else value

    @property
    def _labels(self) -> dict[str, str]:
        return {_text(value).casefold(): label for value, label in self.labels.items()}


def read_records(source: Source, naming: Naming | None = None, found: list[Found] | None = None) -> Iterator[Record]:
    """The rows of all files, or of the table, in order and with the fields of moe-ray's own form.

    Args:
        source: see `read_examples`.
        naming: what is said about columns and values.
        found: gets an entry for each table; its counts are complete when examples were made of the rows.

    Raises:
        InputError: a file is missing or unreadable, a table has no rows or columns that say too little, or no table has a
            column that `naming` names.
        OutsideFailed: a remote file cannot be read now.
    """
    naming = naming or Naming()
    told = [] if found is None else found
    before = len(told)
    for table in tables_of(source):
        about, records = in_own_form(table, naming)
        told.append(about)
        yield from records
    if naming.fields and not any(about.form == NAMED for about in told[before:]):
        raise InputError(
            f"prompts.fields: got {', '.join(map(repr, naming.fields.values()))}, expected columns of a file; no file has "
            "the one for the prompt"
        )


def in_own_form(table: Table, naming: Naming) -> tuple[Found, Iterator[Record]]:
    """What is found in a table, and its rows with the fields of moe-ray's own form.

    Raises:
        InputError: the table has no rows, or its columns say too little; the message says which setting says more.
    """
    records = iter(table.records)
    first = [_small_letters(record) for record in islice(records, _ROWS_LOOKED_AT)]
    if not first:
        raise InputError(f"no examples in {table.name}; expected rows with `prompt` and `label`, or of a known form")
    columns = dict.fromkeys(name for record in first for name in record.fields)
    every = chain(first, map(_small_letters, records))
    if (named := _named(naming, columns)) is not None:
        found = Found(table=table.name, form=NAMED)
        return found, _rows_as_named(every, named, naming, found, _file_label(naming.file_labels, table))
    schema = next((one for one in SCHEMAS if one.fits(columns, table.places)), None)
    if schema is not None:
        found = Found(table=table.name, form=schema.name)
        label = schema.always or _file_label({**schema.file_labels, **naming.file_labels}, table)
        if not label and not schema.label:
            raise InputError(
                f"{table.name}: {schema.name} says the label by the file's name, expected one of the words "
                f"{', '.join(schema.file_labels)} in it; set prompts.file_labels={{PART OF THE NAME: safe or unsafe}}"
            )
        return found, _rows_of_schema(every, schema, label, naming, found)
    label = _file_label(naming.file_labels, table)
    _check_own(table, columns, label)
    found = Found(table=table.name, form=OWN_FORM)
    return found, _rows_as_named(every, {}, naming, found, label)


def _small_letters(record: Record) -> Record:
    """The record with its columns in small letters.

    Raises:
        InputError: two columns differ in their case alone.
    """
    fields: dict[str, Any] = {}
    for name, value in record.fields.items():
        small = name.strip().casefold()
        if small in fields:
            raise InputError(f"{record.location}: column {name!r} is there twice, in other letters; remove one")
        fields[small] = value
    return record._replace(fields=fields)


def _named(naming: Naming, columns: Mapping[str, Any]) -> dict[str, str] | None:
    """Our names by the columns that the user names for them; None where this table has none of them."""
    wanted = {column.strip().casefold(): ours for ours, column in naming.fields.items()}
    told = [column for column, ours in wanted.items() if ours in ("prompt", "messages")] or list(wanted)
    return wanted if any(column in columns for column in told) else None


def _check_own(table: Table, columns: Mapping[str, Any], label: str) -> None:
    has_request = "prompt" in columns or "messages" in columns
    if {"goal", "all_prompt"} & set(columns) or (has_request and (label or "label" in columns)):
        return
    known = ", ".join(schema.name for schema in SCHEMAS)
    missing = "no column for the label" if has_request else "no column for the prompt"
    what = (
        "set prompts.fields={label: COLUMN}, or prompts.file_labels={PART OF THE FILE'S NAME: safe or unsafe} where all "
        "its rows have one label"
        if has_request
        else "set prompts.fields={prompt: COLUMN, label: COLUMN}"
    )
    raise InputError(
        f"{table.name}: {missing}: got columns {', '.join(columns)[:300] or 'none'}, expected `prompt` or `messages` with "
        f"`label`, `goal` with `all_prompt`, or the columns of {known}; {what}"
    )


def _file_label(words: Mapping[str, str], table: Table) -> str:
    """The label that a file's name says, or else that of its folder; empty where none does.

    Raises:
        InputError: a name says both.
    """
    for place in table.places:
        labels = {label for word, label in words.items() if str(word).casefold() in place}
        if len(labels) > 1:
            raise InputError(
                f"{table.name}: its name says safe and unsafe; set prompts.file_labels={{PART OF THE NAME: safe or "
                "unsafe} to a part that no other file has"
            )
        if labels:
            return labels.pop()
    return ""


def _rows_as_named(
    records: Iterator[Record], named: Mapping[str, str], naming: Naming, found: Found, label: str
) -> Iterator[Record]:
    for record in records:
        found.rows += 1
        fields = {name: value for name, value in record.fields.items() if name not in named}
        fields |= {named[name]: value for name, value in record.fields.items() if name in named}
        if "label" in fields:
            fields["label"] = naming.label_of(fields["label"])
        elif label and "all_prompt" not in fields:
            fields["label"] = label
        if "pair" in fields:
            fields["pair"] = _text(fields["pair"])
        yield record._replace(fields=fields, found=found)


def _rows_of_schema(
    records: Iterator[Record], schema: Schema, label: str, naming: Naming, found: Found
) -> Iterator[Record]:
    seen: set[bytes] = set()
    for record in records:
        found.rows += 1
        row = record.fields
        said = label or naming.label_of(row.get(schema.label))
        if schema.unlabelled and said is None:
            found.left_out[_UNLABELLED] += 1
            continue
        prompt = row.get(schema.prompt)
        if schema.turns:
            prompt = _only_turn(prompt)
        if schema.once and isinstance(prompt, str):
            before = len(seen)
            seen.add(hashlib.blake2b(prompt.encode("utf-8", "surrogatepass"), digest_size=16).digest())
            if len(seen) == before:
                found.left_out[_REPEATED] += 1
                continue
        context = row.get(schema.context)
        fields = {
            "prompt": f"{context}\n\n---\n\n{prompt}" if context else prompt,
            "label": schema.labels.get(_text(said).casefold(), said),
            "id": "/".join(_text(row[name]) for name in schema.id if name in row) or record.number,
            "category": _value(schema, row, schema.category).removeprefix(schema.category_prefix),
            "topic": _value(schema, row, schema.topic),
            "template": _value(schema, row, schema.template),
            "pair": _pair(schema, row),
        }
        yield from _both(record, schema, {name: value for name, value in fields.items() if value is not None}, found)


def _both(record: Record, schema: Schema, fields: dict[str, Any], found: Found) -> Iterator[Record]:
    """The row, with its harmless twin before it where it has one."""
    twin = record.fields.get(schema.safe_prompt)
    if not schema.safe_prompt or twin is None:
        yield record._replace(fields=fields, found=found)
        return
    pair = f"{schema.name}/{record.source}/{fields['id']}"
    for label, prompt in (("safe", twin), (fields["label"], fields["prompt"])):
        own = {"prompt": prompt, "label": label, "id": f"{fields['id']}/{label}", "pair": pair}
        yield record._replace(fields={**fields, **own}, found=found)


def _value(schema: Schema, row: Mapping[str, Any], column: str) -> str:
    text = _text(row.get(column, ""))
    return schema.values.get(column, {}).get(text.casefold(), text)


def _pair(schema: Schema, row: Mapping[str, Any]) -> str | None:
    """What the two requests of a pair have alike, in whichever table they are."""
    if not schema.pair or any(row.get(column) is None for column in schema.pair):
        return None
    parts = (_text(row[column]).removeprefix(schema.category_prefix) for column in schema.pair)
    return "/".join((schema.name, *parts))


def _text(value: Any) -> str:
    """A value as it stands in a file: `true`, `3`, or the text."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return "" if value is None else str(value)


def _only_turn(value: Any) -> Any:
    """The request of a list with one turn, which a CSV file writes as text; any other value as it is."""
    turns = value
    if isinstance(value, str) and value.startswith("["):
        for parse in (json.loads, ast.literal_eval):
            try:
                turns = parse(value)
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                continue
            break
    return turns[0] if isinstance(turns, Sequence) and not isinstance(turns, str) and len(turns) == 1 else value
