"""Where examples come from: JSONL, JSON and Parquet files, pandas tables and `datasets` of Hugging Face.

Each source gives rows as dictionaries of plain Python values, with the words that name a row to people.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from moe_ray.errors import InputError


@runtime_checkable
class Dataset(Protocol):
    """What moe-ray needs of a `datasets.Dataset`, which is no dependency of it."""

    column_names: Any

    def to_pandas(self) -> Any:
        """All rows as a pandas table."""


Source = str | Path | Sequence[str | Path] | pd.DataFrame | Dataset
"""What examples are read from."""


class Record(NamedTuple):
    """A row as read.

    Attributes:
        source: what the ids of its examples begin with, such as a file's stem.
        number: of the row in its source: a line counted from 1, or a table's row counted from 0.
        location: source and number as people look them up: `prompts.jsonl:3`, `DataFrame row 3`.
        fields: its values by name.
    """

    source: str
    number: int
    location: str
    fields: dict[str, Any]


def name_of(source: Source) -> str:
    """What a message calls the source."""
    if isinstance(source, pd.DataFrame):
        return "the DataFrame"
    return "the Dataset" if isinstance(source, Dataset) else ", ".join(map(str, _paths(source)))


def read_records(source: Source) -> Iterator[Record]:
    """The rows of all files, or of the table, in order.

    Raises:
        InputError: a file is missing or unreadable, or the source is none of those that can be read.
    """
    if isinstance(source, pd.DataFrame):
        yield from _of_frame(source, "DataFrame")
    elif isinstance(source, Dataset):
        yield from _of_frame(source.to_pandas(), "Dataset")
    else:
        for path in _paths(source):
            yield from _of_file(path)


def _paths(source: Any) -> list[Path]:
    names = [source] if isinstance(source, (str, Path)) else source
    if hasattr(source, "column_names") or isinstance(source, dict):
        raise InputError(
            f"examples: got a {type(source).__name__}, expected one table; give one split in memory, such as "
            "dataset['train']"
        )
    if not isinstance(names, Sequence) or not all(isinstance(name, (str, Path)) for name in names):
        raise InputError(
            f"examples: got a {type(source).__name__}, expected a file, a list of files, a pandas DataFrame or a "
            "datasets.Dataset"
        )
    return [Path(name) for name in names]


def _of_frame(frame: pd.DataFrame, name: str) -> Iterator[Record]:
    for number, row in enumerate(frame.to_dict("records")):
        values = {str(column): _plain(value) for column, value in row.items()}
        fields = {column: value for column, value in values.items() if value is not None}
        yield Record(name, number, f"{name} row {number}", fields)


def _plain(value: Any) -> Any:
    """A table's value as the file of the same rows would give it: lists for arrays, None for every kind of missing."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, np.generic):
        return _plain(value.item())
    return None if pd.api.types.is_scalar(value) and pd.isna(value) else value


def _of_file(path: Path) -> Iterator[Record]:
    if not path.is_file():
        raise InputError(f"prompts file {str(path)!r} does not exist; check prompts.files")
    readers = {".jsonl": _read_jsonl, ".json": _read_json, ".parquet": _read_parquet}
    if path.suffix not in readers:
        raise InputError(f"prompts file {str(path)!r}: got ending {path.suffix!r}, expected .jsonl, .json or .parquet")
    for line, fields in readers[path.suffix](path):
        yield Record(path.stem, line, f"{path}:{line}", fields)


def _read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    # Not splitlines: it also breaks at U+2028 and its like, which JSON strings may hold as they are.
    for line, text in enumerate(_read_text(path).split("\n"), start=1):
        if text.strip():
            yield line, _as_object(path, line, text)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"prompts file {str(path)!r}: byte {error.start} is not UTF-8 ({error.reason}); save the file as UTF-8"
        ) from error
    except OSError as error:
        raise InputError(f"prompts file {str(path)!r} cannot be read: {error.strerror}") from error


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


def _read_json(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """A JSON array of objects; each is decoded on its own so that its line is known."""
    text = _read_text(path)
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
        yield line, _check_object(path, line, value)


def _read_parquet(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        rows = pq.read_table(path).to_pylist()
    except (OSError, ValueError) as error:
        raise InputError(f"prompts file {str(path)!r} cannot be read as Parquet: {error}") from error
    for line, row in enumerate(rows, start=1):
        yield line, {name: value for name, value in row.items() if value is not None}
