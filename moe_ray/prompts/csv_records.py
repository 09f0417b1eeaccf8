"""Records of CSV and TSV files, whose first row names the columns, read one by one."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterator

from moe_ray.errors import InputError
from moe_ray.prompts.json_records import FileRecord
from moe_ray.prompts.prompt_files import PromptFile
from moe_ray.prompts.text_file import opened_text

_LONGEST_FIELD = 1 << 30


def read_csv(file: PromptFile) -> Iterator[FileRecord]:
    """The rows of a file with commas between its values, or tabs where its ending is `.tsv`, numbered from 1.

    A value may be in double quotes, and then hold the separator and line feeds. An empty value is a missing one.

    Raises:
        InputError: the file cannot be read, names a column twice or not at all, or a row has more or fewer values than
            there are columns.
    """
    # Python's own limit is 128 KiB, which a prompt with a document in it may be above.
    csv.field_size_limit(_LONGEST_FIELD)
    with opened_text(file, newline="") as text:
        rows = csv.reader(text, delimiter="\t" if file.ending == ".tsv" else ",", strict=True)
        try:
            columns = next(rows, [])
            _check_columns(file, columns)
            number, line = 0, rows.line_num + 1
            for row in rows:
                place, line = str(line), rows.line_num + 1
                if not row:
                    continue
                number += 1
                if len(row) != len(columns):
                    raise InputError(
                        f"{file}:{place}: got {len(row)} values, expected {len(columns)}, one for each column; put values "
                        "that hold the separator or a line feed in double quotes"
                    )
                yield number, place, {name: value for name, value in zip(columns, row, strict=True) if value}
        except csv.Error as error:
            raise InputError(
                f"{file}:{rows.line_num}: not valid {file.ending.removeprefix('.').upper()} ({error})"
            ) from error


def _check_columns(file: PromptFile, columns: list[str]) -> None:
    twice = [name for name, number in Counter(columns).items() if number > 1]
    if twice:
        raise InputError(f"{file}:1: column {twice[0]!r} is there twice; name each column once")
