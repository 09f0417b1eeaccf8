"""Prompt files that are damaged or hold what nobody expects: examples, or a sentence that names the file."""

from __future__ import annotations

import json

import pandas as pd
import pytest
from damage import ODD_JSON, damaged, of_other_types, refusal_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_ray.errors import InputError
from moe_ray.prompts.examples import read_examples
from moe_ray.prompts.recognition import read_records
from moe_ray.prompts.spooled_examples import read_spooled

ROWS = [
    {"prompt": "wie geht es dir, 😀?", "label": "safe", "category": "a", "id": "one", "split": "train"},
    {"messages": [{"role": "user", "content": "b"}], "label": "unsafe", "target": "No.", "topic": 3},
    {"goal": "c", "all_prompt": '[{"role": "user", "content": "c"}]', "category": "d"},
]
many = settings(max_examples=120, suppress_health_check=list(HealthCheck), database=None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("prompts")


def read_both_ways(path):
    """Lists in memory and on disk take or refuse the same files, in the same words."""
    said = [refusal_of(lambda: read_examples(path)), refusal_of(lambda: list(read_spooled([read_records(path)])))]
    assert said[0] == said[1] or "no examples" in said[0]
    assert said[0] is None or path.name in said[0]
    assert said[0] is None or max(map(len, said[0].split("\n"))) < 1000


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["jsonl", "json"])
@many
@given(st.data())
def test_a_damaged_json_file(folder, ending, data):
    whole = json.dumps(ROWS) if ending == "json" else "\n".join(map(json.dumps, ROWS))
    changed = damaged(whole.encode())
    if ending == "json":
        changed = st.one_of(changed, of_other_types(whole.encode()))
    path = folder / f"p.{ending}"
    path.write_bytes(data.draw(changed))
    read_both_ways(path)


@pytest.mark.slow
@many
@given(st.data())
def test_a_damaged_table(folder, data):
    path = folder / "p.parquet"
    pd.DataFrame([{"prompt": "a" * 20, "label": "safe"}, {"prompt": "b", "label": "unsafe"}] * 9).to_parquet(path)
    path.write_bytes(data.draw(damaged(path.read_bytes())))
    read_both_ways(path)


@pytest.mark.slow
@many
@given(st.sampled_from(["prompt", "label", "id", "split", "topic", "messages", "all_prompt", "x"]), st.data())
def test_a_field_of_another_type(folder, field, data):
    row = {**data.draw(st.sampled_from(ROWS)), field: data.draw(st.sampled_from(ODD_JSON))}
    path = folder / "p.jsonl"
    path.write_text(json.dumps(row))
    read_both_ways(path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 100_000, "brackets are nested too deeply"),
        ('{"a":' * 100_000, "brackets are nested too deeply"),
        (f'{{"prompt": "a", "n": {"9" * 5000}}}', "a number has too many digits"),
    ],
)
@pytest.mark.parametrize("ending", ["jsonl", "json"])
def test_more_than_python_takes_is_named_by_its_line(tmp_path, ending, text, said):
    path = tmp_path / f"p.{ending}"
    path.write_text(f"\n{text}" if ending == "jsonl" else f"[\n{text}")
    with pytest.raises(InputError, match=rf"p\.{ending}:2: {said}"):
        read_examples(path)


def test_a_long_value_is_shown_in_short(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"prompt": "a", "label": "x" * 10**6}))
    with pytest.raises(InputError) as error:
        read_examples(path)
    assert len(str(error.value)) < 500


def test_an_id_is_a_text_or_a_number(tmp_path):
    path = tmp_path / "p.jsonl"
    rows = [{"prompt": "a", "label": "safe", "id": value} for value in (7, "x", 1.5, None)]
    path.write_text("\n".join(map(json.dumps, rows)))
    assert [example.id for example in read_examples(path)] == ["p:7", "p:x", "p:1.5", "p:4"]
    for value in ([], {"a": 1}, True, float("nan")):
        path.write_text(json.dumps({"prompt": "a", "label": "safe", "id": value}))
        with pytest.raises(InputError, match=r"p\.jsonl:1: id: got .* expected text or a number"):
            read_examples(path)
