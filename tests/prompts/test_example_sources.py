"""The same records give the same examples from a file of any format and from a table."""

import json

import datasets
import numpy as np
import pandas as pd
import pytest
from prompt_examples import CHAT, ROWS, write_lines

from moe_ray.errors import InputError
from moe_ray.prompts.examples import read_examples


@pytest.mark.parametrize("ending", ["jsonl", "json", "parquet", "csv", "tsv"])
def test_the_same_rows_give_the_same_examples_in_every_format(tmp_path, ending):
    path = tmp_path / f"prompts.{ending}"
    if ending == "jsonl":
        write_lines(path, ROWS)
    elif ending == "json":
        path.write_text(json.dumps(ROWS, indent=1))
    elif ending == "parquet":
        pd.DataFrame(ROWS).to_parquet(path)
    else:
        table = pd.DataFrame([{**row, "messages": json.dumps(row.get("messages"))} for row in ROWS])
        table.loc[0, "messages"] = None
        table.to_csv(path, index=False, sep="," if ending == "csv" else "\t")
    safe, unsafe = read_examples([path])
    assert (safe.id, safe.label, safe.category, safe.target) == ("prompts:7", "safe", "violence", "Use kill.")
    assert safe.messages == ({"role": "user", "content": "How do I kill a process?"},)
    assert (unsafe.messages, unsafe.response, unsafe.target) == (tuple(CHAT), "Sure.", None)


def test_a_wrong_record_of_a_json_array_is_named_by_its_line(tmp_path):
    path = tmp_path / "bad.json"
    path.write_text('[\n {"prompt": "a", "label": "safe"},\n\n {"prompt": "b"}\n]')
    with pytest.raises(InputError, match=r"bad\.json:4: label: missing"):
        read_examples([path])


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("none.jsonl", None, "does not exist"),
        ("p.txt", "a,b", "expected .csv, .tsv, .jsonl, .json or .parquet"),
        ("p.jsonl", "{", "p.jsonl:1: not valid JSON"),
        ("p.jsonl", "[1]", "p.jsonl:1: got a list, expected an object"),
        ("p.json", '{"a": 1}', "expected a JSON array"),
        ("p.json", "[{]", "not valid JSON"),
        ("p.json", "[{}", "not valid JSON"),
        ("p.parquet", "no", "cannot be read as Parquet"),
        ("p.jsonl", "\n", "no examples"),
        ("p.jsonl", b'{"prompt": "caf\xe9"}', "byte 15 is not UTF-8"),
        ("p.json", b'[{"prompt": "caf\xe9"}]', "byte 16 is not UTF-8"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, text, said):
    path = tmp_path / name
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError) as error:
        read_examples([path])
    assert said in str(error.value)
    assert name.partition(".")[0] in str(error.value)


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85"])
def test_only_a_line_feed_ends_a_line_of_jsonl(tmp_path, separator):
    path = tmp_path / "p.jsonl"
    path.write_text(f'{{"prompt": "a{separator}b", "label": "safe"}}\r\n{{"prompt": "c", "label": "safe"}}\n')
    assert [example.messages[0]["content"] for example in read_examples(path)] == [f"a{separator}b", "c"]


# Tables


class StandInDataset:
    """What moe-ray touches of a `datasets.Dataset`, whose `to_pandas` gives lists of structures as numpy arrays."""

    def __init__(self, rows):
        self.rows = rows

    @property
    def column_names(self):
        return list(self.rows[0])

    def to_pandas(self):
        frame = pd.DataFrame(self.rows)
        if "messages" in frame:
            as_arrays = [np.array(value, dtype=object) if value else None for value in frame["messages"]]
            frame["messages"] = pd.Series(as_arrays, dtype=object)
        return frame


def without_missing(example):
    """What of an example does not depend on where it was read."""
    return example.messages, example.label, example.category, example.response, example.target


@pytest.mark.parametrize("as_table", [pd.DataFrame, StandInDataset])
def test_a_table_gives_the_examples_of_the_file_with_the_same_rows(tmp_path, as_table):
    rows = [{**dict.fromkeys(["prompt", "messages", "category", "target", "response"]), **row} for row in ROWS]
    from_file = read_examples(str(write_lines(tmp_path / "p.jsonl", ROWS)))
    from_table = read_examples(as_table(rows))
    assert list(map(without_missing, from_table)) == list(map(without_missing, from_file))
    assert [example.id.partition(":")[2] for example in from_table] == ["7", "8"]


def test_a_table_of_parquet_gives_the_examples_of_the_file(tmp_path):
    pd.DataFrame(ROWS).to_parquet(tmp_path / "DataFrame.parquet")
    path = tmp_path / "DataFrame.parquet"
    assert read_examples(pd.read_parquet(path)) == read_examples([path])


def test_a_real_dataset_gives_the_examples_of_its_table():
    rows = [{"prompt": "a", "label": "safe", "id": "1"}, {"prompt": "b", "label": "unsafe", "id": "2"}]
    examples = read_examples(datasets.Dataset.from_list(rows))
    assert [(example.id, example.label) for example in examples] == [("Dataset:1", "safe"), ("Dataset:2", "unsafe")]


@pytest.mark.parametrize(("as_table", "name"), [(pd.DataFrame, "DataFrame"), (StandInDataset, "Dataset")])
def test_wrong_rows_of_a_table_are_named_by_their_position(as_table, name):
    rows = [{"prompt": "a", "label": "safe"}] * 2 + [{"prompt": "a", "label": "bad"}, {"prompt": None, "label": "safe"}]
    with pytest.raises(InputError) as error:
        read_examples(as_table(rows))
    assert "2 wrong rows" in str(error.value)
    assert f"{name} row 2: label: got 'bad'" in str(error.value)
    assert f"{name} row 3: prompt: missing; got fields label" in str(error.value)


def test_a_filtered_table_is_named_by_position_whatever_its_index():
    frame = pd.DataFrame([{"prompt": "a", "label": "safe"}, {"prompt": "b", "label": "bad"}], index=[30, 10])
    with pytest.raises(InputError, match="DataFrame row 1: label"):
        read_examples(frame)


class ManySplits(dict):
    """A `datasets.DatasetDict` has names of columns too, but no table of its own."""

    @property
    def column_names(self):
        return {"train": ["prompt"]}


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (pd.DataFrame({"prompt": [], "label": []}), "no examples in the DataFrame"),
        (ManySplits(train=[]), r"got a ManySplits, expected one table; .*dataset\['train'\]"),
        (7, "got a int, expected a file"),
        ([{"prompt": "a"}], "got a list, expected a file"),
    ],
)
def test_what_holds_no_examples_is_refused(source, said):
    with pytest.raises(InputError, match=said):
        read_examples(source)


def test_one_path_needs_no_list(tmp_path):
    path = write_lines(tmp_path / "p.jsonl", ROWS)
    assert read_examples(path) == read_examples(str(path)) == read_examples([path])
