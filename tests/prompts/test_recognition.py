"""Columns are found by what the user names or by a published form; what says too little is refused with what to set."""

import json

import datasets
import pandas as pd
import pytest
from benchmark_files import JAILBREAKBENCH, JBB_BENIGN, JBB_HARMFUL, OR_BENCH, XSTEST, XSTEST_COLUMNS, write_csv
from prompt_examples import write_lines

from moe_ray.errors import InputError
from moe_ray.prompts.examples import read_examples


def labels_of(examples):
    return [example.label for example in examples]


@pytest.mark.parametrize("make", [str.upper, str.lower, str.title])
def test_columns_are_found_whatever_their_case(tmp_path, make):
    columns = [make(name) for name in XSTEST_COLUMNS]
    path = write_csv(tmp_path / "x.csv", columns, XSTEST)
    found = []
    assert len(read_examples(path, found=found)) == len(XSTEST)
    assert found[0].form == "XSTest"
    own = write_lines(tmp_path / "own.jsonl", [{make("prompt"): "a", make("label"): "safe"}])
    assert labels_of(read_examples(own)) == ["safe"]


def test_two_columns_that_differ_in_case_alone_are_refused(tmp_path):
    path = write_lines(tmp_path / "p.jsonl", [{"Prompt": "a", "prompt": "b", "label": "safe"}])
    with pytest.raises(InputError, match=r"p\.jsonl:1: column 'prompt' is there twice"):
        read_examples(path)


def test_columns_and_values_have_the_names_that_the_user_gives(tmp_path):
    path = write_lines(tmp_path / "p.jsonl", [{"Text": "a", "is_toxic": 1, "kind": 3}, {"Text": "b", "is_toxic": 0}])
    found = []
    examples = read_examples(
        path,
        fields={"prompt": "text", "label": "is_toxic", "category": "kind"},
        labels={1: "unsafe", "0": "safe"},
        found=found,
    )
    assert labels_of(examples) == ["unsafe", "safe"]
    assert [one.category for one in examples] == ["3", ""]
    assert str(found[0]) == f"{path}: prompts.fields: 2 rows, 1 safe, 1 unsafe"


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        (["harmful", "Unharmful"], {"harmful": "unsafe", "unharmful": "safe"}),
        ([True, False], {"true": "unsafe", "false": "safe"}),
        ([1.0, 0.0], {1: "unsafe", 0: "safe"}),
        (["safe", "unsafe"][::-1], {}),
    ],
)
def test_values_stand_for_labels_as_they_are_written(tmp_path, values, labels):
    path = write_lines(tmp_path / "p.jsonl", [{"prompt": f"p{n}", "label": value} for n, value in enumerate(values)])
    assert labels_of(read_examples(path, labels=labels)) == ["unsafe", "safe"]


def test_a_value_that_stands_for_nothing_is_named_by_file_and_row(tmp_path):
    path = write_lines(tmp_path / "p.jsonl", [{"prompt": "a", "label": "safe"}, {"prompt": "b", "label": "maybe"}])
    with pytest.raises(
        InputError, match=r"p\.jsonl:2: label: got 'maybe', expected 'safe' or 'unsafe'.*prompts\.labels"
    ):
        read_examples(path, labels={"no": "safe"})


def test_a_column_that_no_file_has_is_refused(tmp_path):
    path = write_lines(tmp_path / "p.jsonl", [{"prompt": "a", "label": "safe"}])
    with pytest.raises(InputError, match=r"prompts\.fields: got 'text', expected columns of a file"):
        read_examples(path, fields={"prompt": "text"})


def test_named_columns_leave_other_files_to_their_known_form(tmp_path):
    own = write_lines(tmp_path / "own.jsonl", [{"text": "a", "label": "safe"}])
    known = write_csv(tmp_path / "x.csv", XSTEST_COLUMNS, XSTEST)
    found = []
    read_examples([own, known], fields={"prompt": "text"}, found=found)
    assert [about.form for about in found] == ["prompts.fields", "XSTest"]


def test_named_columns_go_before_a_known_form(tmp_path):
    path = write_csv(tmp_path / "harmful.csv", ["goal", "target"], [["a", "I won't."]])
    (example,) = read_examples(path, fields={"prompt": "goal"}, file_labels={"harmful": "unsafe"})
    assert (example.target, example.label) == ("I won't.", "unsafe")
    assert read_examples(path)[0].target is None


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": "a", "label": "safe"}, r"no column for the prompt: got columns text, label, .*prompts\.fields="),
        ({"prompt": "a"}, r"no column for the label: got columns prompt, .*prompts\.file_labels="),
        (OR_BENCH[0], r"no column for the label: got columns prompt, category"),
        ({"goal": "a", "aim": "b"}, None),
    ],
)
def test_what_says_too_little_is_refused_with_what_to_set(tmp_path, row, said):
    path = write_lines(tmp_path / "p.jsonl", [row])
    with pytest.raises(InputError, match=said or "all_prompt"):
        read_examples(path)


def test_a_known_form_whose_file_does_not_say_the_label_is_refused_until_it_is_set(tmp_path):
    paths = [
        write_csv(tmp_path / f"{name}.csv", JAILBREAKBENCH, rows)
        for name, rows in (("a", JBB_HARMFUL), ("b", JBB_BENIGN))
    ]
    with pytest.raises(InputError, match=r"a\.csv: JailbreakBench says the label by the file's name.*file_labels"):
        read_examples(paths)
    examples = read_examples(paths, file_labels={"a.csv": "unsafe", "b.csv": "safe"})
    assert labels_of(examples) == ["unsafe", "safe"] * 2
    assert all(one.pair for one in examples)


def test_a_files_name_goes_before_its_folders_and_must_not_say_both(tmp_path):
    folder = tmp_path / "harmful"
    folder.mkdir()
    path = write_csv(folder / "benign-behaviors.csv", JAILBREAKBENCH, JBB_BENIGN)
    assert set(labels_of(read_examples(path))) == {"safe"}
    path = write_csv(folder / "harmful-and-benign.csv", JAILBREAKBENCH, JBB_BENIGN)
    with pytest.raises(InputError, match="its name says safe and unsafe"):
        read_examples(path)


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "parquet"])
def test_a_file_without_rows_is_refused_beside_one_that_has_some(tmp_path, ending):
    empty = tmp_path / f"empty.{ending}"
    if ending == "parquet":
        pd.DataFrame({"prompt": [], "label": []}).to_parquet(empty)
    else:
        empty.write_text({"jsonl": "", "json": "[]", "csv": "prompt,label\n"}[ending])
    full = write_lines(tmp_path / "full.jsonl", [{"prompt": "a", "label": "safe"}])
    with pytest.raises(InputError, match=rf"no examples in .*empty\.{ending}"):
        read_examples([full, empty])


def test_tables_in_memory_are_recognised_as_files_are():
    found = []
    examples = read_examples(pd.DataFrame(XSTEST, columns=XSTEST_COLUMNS), found=found)
    assert (found[0].form, len(examples)) == ("XSTest", len(XSTEST))
    table = datasets.Dataset.from_pandas(pd.DataFrame(JBB_BENIGN, columns=JAILBREAKBENCH), split="benign")
    assert set(labels_of(read_examples(table))) == {"safe"}


def test_rows_of_our_own_form_may_say_their_pair(tmp_path):
    rows = [
        {"id": "a", "prompt": "a", "label": "safe", "pair": 1},
        {"id": "b", "prompt": "b", "label": "unsafe", "pair": 2},
        {"id": "c", "prompt": "c", "label": "unsafe", "pair": 1},
        {"id": "d", "prompt": "d", "label": "safe"},
    ]
    examples = read_examples(write_lines(tmp_path / "p.jsonl", rows))
    assert [(one.id, one.pair) for one in examples] == [
        ("p:a", "p:a"),
        ("p:c", "p:a"),
        ("p:d", None),
        ("p:b", None),
    ]


def test_a_table_that_is_named_by_its_first_rows_may_lack_values_in_the_first(tmp_path):
    rows = [{"prompt": "a"}, {"prompt": "b", "label": "safe"}]
    path = tmp_path / "p.json"
    path.write_text(json.dumps(rows))
    with pytest.raises(InputError, match=r"p\.json:1: label: missing"):
        read_examples(path)
