"""Where examples come from: CSV, TSV, JSONL, JSON and Parquet files, pandas tables and `datasets` of Hugging Face.

Each source gives rows as dictionaries of plain Python values, with the words that name a row to people.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from moe_ray.errors import InputError
from moe_ray.prompts.csv_records import read_csv
from moe_ray.prompts.json_records import FileRecord, read_json_array, read_jsonl
from moe_ray.prompts.prompt_files import PromptFile, names_of_files, opened, places, prefixes
from moe_ray.storage.damage import reading

_ROWS_PER_READ = 1024


@runtime_checkable
class Dataset(Protocol):
    """What moe-ray needs of a `datasets.Dataset`, which is no dependency of it."""

    column_names: Any

    def to_pandas(self) -> Any:
        """All rows as a pandas table."""


Source = str | Path | Sequence[str | Path] | pd.DataFrame | Dataset
"""What examples are read from."""


@dataclass(kw_only=True)
class Found:
    """What was read of one table.

    Attributes:
        table: its name.
        form: the published form that it is of; or `moe-ray`, or `prompts.fields`.
        rows: that were read.
        safe: examples.
        unsafe: examples.
        pairs: of a safe and an unsafe example.
        left_out: rows by reason.
    """

    table: str
    form: str
    rows: int = 0
    safe: int = 0
    unsafe: int = 0
    pairs: int = 0
    left_out: Counter[str] = field(default_factory=Counter)

    def to_record(self) -> dict[str, Any]:
        """The same as plain values."""
        return {**vars(self), "left_out": dict(self.left_out)}

    def __str__(self) -> str:
        """One line for people."""
        parts = [f"{self.rows} rows", f"{self.safe} safe", f"{self.unsafe} unsafe"]
        parts += [f"{self.pairs} pairs"] * bool(self.pairs)
        parts += [f"{number} left out ({reason})" for reason, number in self.left_out.items()]
        return f"{self.table}: {self.form}: {', '.join(parts)}"


class Record(NamedTuple):
    """A row as read.

    Attributes:
        source: what the ids of its examples begin with, such as a file's stem.
        number: of the row in its source: a line of JSONL, or which record of a JSON array or a Parquet file, counted from
            1; a table's row counted from 0.
        location: where people find it: `prompts.jsonl:3`, `DataFrame row 3`.
        fields: its values by name.
        found: counts what becomes of the table's rows; None = nobody does.
    """

    source: str
    number: int
    location: str
    fields: dict[str, Any]
    found: Found | None = None


class Table(NamedTuple):
    """Rows of one file, or of a table in memory.

    Attributes:
        name: as messages call it.
        places: the file's name and that of its folder, in small letters; of a `datasets.Dataset`, its split.
        records: its rows.
    """

    name: str
    places: tuple[str, ...]
    records: Iterable[Record]


def name_of(source: Source) -> str:
    """What a message calls the source."""
    if isinstance(source, pd.DataFrame):
        return "the DataFrame"
    return "the Dataset" if isinstance(source, Dataset) else ", ".join(_paths(source))


def tables_of(source: Source) -> Iterator[Table]:
    """The tables of a source in order, each to be read before the next.

    Raises:
        InputError: a file is missing or unreadable, or the source is none of those that can be read.
        OutsideFailed: a remote file cannot be read now.
    """
    if isinstance(source, pd.DataFrame):
        yield Table("the DataFrame", (), _of_frame(source, "DataFrame"))
    elif isinstance(source, Dataset):
        split = str(getattr(source, "split", None) or "").lower()
        yield Table("the Dataset", (split,) if split else (), _of_frame(source.to_pandas(), "Dataset"))
    else:
        names = names_of_files(_paths(source))
        for name, prefix in zip(names, prefixes(names), strict=True):
            yield Table(name, places(name), _of_file(name, prefix))


def records_of(rows: Iterable[Mapping[str, Any]], source: str) -> Iterator[Record]:
    """Dictionaries with the fields of a file's rows, as rows of a source with this name."""
    for number, fields in enumerate(rows, start=1):
        yield Record(source, number, f"{source}:{number}", dict(fields))


def _paths(source: Any) -> list[str]:
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
    return [str(name) for name in names]


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


_READERS = {
    ".jsonl": read_jsonl,
    ".json": read_json_array,
    ".csv": read_csv,
    ".tsv": read_csv,
}


def _of_file(name: str, prefix: str) -> Iterator[Record]:
    with opened(name, prefix) as file:
        read = _read_parquet if file.ending == ".parquet" else _READERS.get(file.ending)
        if read is None:
            raise InputError(
                f"prompts file {name!r}: got ending {file.ending!r}, expected .csv, .tsv, .jsonl, .json or .parquet, all "
                "but the last also with .gz after it"
            )
        for number, place, fields in read(file):
            yield Record(prefix, number, f"{name}:{place}", fields)


def _read_parquet(file: PromptFile) -> Iterator[FileRecord]:
    number = 0
    try:
        # Without a buffer of whole row groups, which can be as large as the file.
        with pq.ParquetFile(file.path, pre_buffer=False) as opened_file:
            for table in opened_file.iter_batches(batch_size=_ROWS_PER_READ):
                rows = _rows_of(table, name=f"prompts file {file.name!r}")
                for row in rows:
                    number += 1
                    yield number, str(number), {name: value for name, value in row.items() if value is not None}
    except (OSError, pa.ArrowException) as error:
        raise InputError(
            f"prompts file {file.name!r} cannot be read as Parquet: {_first_line(error)}; give a whole Parquet file"
        ) from error


def _rows_of(table: pa.RecordBatch, *, name: str) -> list[dict[str, Any]]:
    with reading(name, expected="columns of texts and numbers", cure="write the file again"):
        rows: list[dict[str, Any]] = table.to_pylist()
    return rows


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
