"""CSV and TSV files: quoted values, missing ones, and what is wrong by its line."""

import pytest

from moe_ray.errors import InputError
from moe_ray.prompts.csv_records import read_csv
from moe_ray.prompts.prompt_files import PromptFile


def rows_of(path, text):
    path.write_text(text, newline="")
    return list(read_csv(PromptFile(name=str(path), path=path, prefix=path.stem)))


def test_a_quoted_value_holds_separators_quotes_and_lines(tmp_path):
    text = 'prompt,label\r\n"a, ""b""\n\nc",safe\r\n\r\nd,\r\n'
    assert rows_of(tmp_path / "p.csv", text) == [
        (1, "2", {"prompt": 'a, "b"\n\nc', "label": "safe"}),
        (2, "6", {"prompt": "d"}),
    ]


def test_tabs_separate_where_the_ending_says_so(tmp_path):
    assert rows_of(tmp_path / "p.tsv", "prompt\tlabel\na, b\tsafe\n")[0][2] == {"prompt": "a, b", "label": "safe"}


def test_a_long_value_is_read(tmp_path):
    assert len(rows_of(tmp_path / "p.csv", f"prompt\n{'x' * 200_000}\n")[0][2]["prompt"]) == 200_000


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a,b\n1,2\n3\n", r"p\.csv:3: got 1 values, expected 2"),
        ("a,b\n1,2,3\n", r"p\.csv:2: got 3 values, expected 2"),
        ("a,a\n1,2\n", r"p\.csv:1: column 'a' is there twice"),
        ('a\n"1\n', r"p\.csv:2: not valid CSV \(unexpected end of data\)"),
    ],
)
def test_a_fault_is_named_by_its_line(tmp_path, text, said):
    with pytest.raises(InputError, match=said):
        rows_of(tmp_path / "p.csv", text)
