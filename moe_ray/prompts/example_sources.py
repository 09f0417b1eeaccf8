"""Where examples come from: JSONL, JSON and Parquet files, pandas tables and `datasets` of Hugging Face.

Each source gives rows as dictionaries of plain Python values, with the words that name a row to people.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from moe_ray.errors import InputError
from moe_ray.prompts.json_records import read_json_array, read_jsonl
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


class Record(NamedTuple):
    """A row as read.

    Attributes:
        source: what the ids of its examples begin with, such as a file's stem.
        number: of the row in its source: a line of JSONL, or which record of a JSON array or a Parquet file, counted from
            1; a table's row counted from 0.
        location: where people find it: `prompts.jsonl:3`, `DataFrame row 3`.
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


def records_of(rows: Iterable[Mapping[str, Any]], source: str) -> Iterator[Record]:
    """Dictionaries with the fields of a file's rows, as rows of a source with this name."""
    for number, fields in enumerate(rows, start=1):
        yield Record(source, number, f"{source}:{number}", dict(fields))


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
    readers = {".jsonl": read_jsonl, ".json": read_json_array, ".parquet": _read_parquet}
    if path.suffix not in readers:
        raise InputError(f"prompts file {str(path)!r}: got ending {path.suffix!r}, expected .jsonl, .json or .parquet")
    stem, name = path.stem, str(path)
    for number, place, fields in readers[path.suffix](path):
        yield Record(stem, number, f"{name}:{place}", fields)


def _read_parquet(path: Path) -> Iterator[tuple[int, str, dict[str, Any]]]:
    number = 0
    try:
        # Without a buffer of whole row groups, which can be as large as the file.
        with pq.ParquetFile(path, pre_buffer=False) as file:
            for table in file.iter_batches(batch_size=_ROWS_PER_READ):
                rows = _rows_of(table, name=f"prompts file {str(path)!r}")
                for row in rows:
                    number += 1
                    yield number, str(number), {name: value for name, value in row.items() if value is not None}
    except (OSError, pa.ArrowException) as error:
        raise InputError(
            f"prompts file {str(path)!r} cannot be read as Parquet: {_first_line(error)}; give a whole Parquet file"
        ) from error


def _rows_of(table: pa.RecordBatch, *, name: str) -> list[dict[str, Any]]:
    with reading(name, expected="columns of texts and numbers", cure="write the file again"):
        rows: list[dict[str, Any]] = table.to_pylist()
    return rows


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
