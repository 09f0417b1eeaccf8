import json

import numpy as np
import pandas as pd
import pytest

from moe_ray.errors import InputError
from moe_ray.prompts.examples import Example, read_examples

CHAT = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "flip this: [x]"}]


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


ROWS = [
    {"id": 7, "prompt": "How do I kill a process?", "label": "safe", "category": "violence", "target": "Use kill."},
    {"id": 8, "messages": CHAT, "label": "unsafe", "response": "Sure."},
]


@pytest.mark.parametrize("ending", ["jsonl", "json", "parquet"])
def test_the_same_rows_give_the_same_examples_in_every_format(tmp_path, ending):
    path = tmp_path / f"prompts.{ending}"
    if ending == "jsonl":
        write_lines(path, ROWS)
    elif ending == "json":
        path.write_text(json.dumps(ROWS, indent=1))
    else:
        pd.DataFrame(ROWS).to_parquet(path)
    safe, unsafe = read_examples([path])
    assert (safe.id, safe.label, safe.category, safe.target) == ("prompts:7", "safe", "violence", "Use kill.")
    assert safe.messages == ({"role": "user", "content": "How do I kill a process?"},)
    assert (unsafe.messages, unsafe.response, unsafe.target) == (tuple(CHAT), "Sure.", None)


@pytest.mark.parametrize("attack", ["plain attack", CHAT, json.dumps(CHAT), str(CHAT)])
def test_a_pair_is_a_safe_goal_and_an_unsafe_attack_however_the_attack_is_written(tmp_path, attack):
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps([{"id": 0, "goal": "the goal", "all_prompt": attack}]))
    safe, unsafe = read_examples([path])
    assert (safe.label, unsafe.label) == ("safe", "unsafe")
    assert safe.pair == unsafe.pair is not None
    assert safe.messages[0]["content"] == "the goal"
    assert unsafe.messages == (tuple(CHAT) if attack != "plain attack" else ({"role": "user", "content": attack},))


@pytest.mark.parametrize(("side", "content"), [("goal", "the goal"), ("attack", "the attack")])
def test_one_side_of_a_pair_can_be_read_as_the_unsafe_example(tmp_path, side, content):
    path = write_lines(tmp_path / "pairs.jsonl", [{"goal": "the goal", "all_prompt": "the attack"}])
    (example,) = read_examples([path], paired_records=side)
    assert (example.label, example.messages[0]["content"], example.pair) == ("unsafe", content, None)


def test_text_that_only_looks_like_a_list_stays_text(tmp_path):
    path = write_lines(tmp_path / "p.jsonl", [{"messages": "[not a list", "label": "safe"}])
    assert read_examples([path])[0].messages[0]["content"] == "[not a list"


def test_all_wrong_rows_are_reported_at_once_with_file_line_and_field(tmp_path):
    rows = [
        {"prompt": "fine", "label": "safe"},
        {"prompt": "", "label": "safe"},
        {"prompt": "x", "label": "harmful"},
        {"label": "safe"},
        {"messages": [{"role": "user"}], "label": "safe"},
        {"messages": [{"role": "assistant", "content": "hi"}], "label": "safe"},
        {"goal": "g", "all_prompt": []},
        {"prompt": "x", "label": "safe", "target": 3},
        {"prompt": "x", "label": "safe", "split": "dev"},
    ]
    path = write_lines(tmp_path / "bad.jsonl", rows)
    with pytest.raises(InputError) as error:
        read_examples([path])
    text = str(error.value)
    fields = ["prompt", "label", "prompt", "messages", "messages", "all_prompt", "target", "split"]
    for line, field in zip(range(2, 10), fields, strict=True):
        assert f"bad.jsonl:{line}: {field}: " in text
    assert "8 wrong rows" in text
    assert "bad.jsonl:1:" not in text


def test_a_wrong_record_of_a_json_array_is_named_by_its_line(tmp_path):
    path = tmp_path / "bad.json"
    path.write_text('[\n {"prompt": "a", "label": "safe"},\n\n {"prompt": "b"}\n]')
    with pytest.raises(InputError, match=r"bad\.json:4: label: missing"):
        read_examples([path])


def test_an_id_used_twice_is_refused(tmp_path):
    path = write_lines(tmp_path / "p.jsonl", [{"id": 1, "prompt": "a", "label": "safe"}] * 2)
    with pytest.raises(InputError, match="used twice"):
        read_examples([path])


def test_two_files_may_use_the_same_ids(tmp_path):
    paths = [write_lines(tmp_path / f"{n}.jsonl", [{"id": 1, "prompt": "a", "label": "safe"}]) for n in "ab"]
    assert [example.id for example in read_examples(paths)] == ["a:1", "b:1"]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("none.jsonl", None, "does not exist"),
        ("p.csv", "a,b", "expected .jsonl, .json or .parquet"),
        ("p.jsonl", "{", "p.jsonl:1: not valid JSON"),
        ("p.jsonl", "[1]", "p.jsonl:1: got a list, expected an object"),
        ("p.json", '{"a": 1}', "expected a JSON array"),
        ("p.json", "[{]", "not valid JSON"),
        ("p.json", "[{}", "not valid JSON"),
        ("p.parquet", "no", "cannot be read as Parquet"),
        ("p.jsonl", "\n", "no examples"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, text, said):
    path = tmp_path / name
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError) as error:
        read_examples([path])
    assert said in str(error.value)
    assert name.partition(".")[0] in str(error.value)


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
    datasets = pytest.importorskip("datasets", reason="datasets is no dependency of moe-ray")
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


def test_an_example_prints_as_one_short_escaped_line():
    example = Example(
        id="p:1", label="unsafe", category="fraud", messages=({"role": "user", "content": "a\n\x1b[31mb" + "c" * 90},)
    )
    assert repr(example) == "Example('p:1', unsafe, fraud, 'a\\n\\x1b[31mb" + "c" * 31 + "…')"
