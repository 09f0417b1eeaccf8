"""Records become examples, and every record that cannot is named with its fault."""

import json

import pytest
from prompt_examples import CHAT, write_lines

from moe_ray.errors import InputError
from moe_ray.prompts.examples import Example, read_examples


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


@pytest.mark.parametrize(("given", "read"), [("weather", "weather"), (3, "3"), (None, ""), ("", "")])
def test_topic_and_template_are_names_or_numbers_of_both_kinds_of_records(tmp_path, given, read):
    rows = [
        {"prompt": "a", "label": "safe", "topic": given, "template": given},
        {"goal": "b", "all_prompt": "c", "topic": given, "template": given},
    ]
    examples = read_examples([write_lines(tmp_path / "p.jsonl", rows)])
    assert [(one.topic, one.template) for one in examples] == [(read, read)] * 3


@pytest.mark.parametrize("field", ["topic", "template"])
def test_a_topic_that_is_neither_is_a_fault(tmp_path, field):
    path = write_lines(tmp_path / "p.jsonl", [{"prompt": "a", "label": "safe", field: ["x"]}])
    with pytest.raises(InputError, match=f"{field}: got list, expected text"):
        read_examples([path])


def test_an_id_used_twice_is_refused(tmp_path):
    path = write_lines(tmp_path / "p.jsonl", [{"id": 1, "prompt": "a", "label": "safe"}] * 2)
    with pytest.raises(InputError, match="used twice"):
        read_examples([path])


def test_two_files_may_use_the_same_ids(tmp_path):
    paths = [write_lines(tmp_path / f"{n}.jsonl", [{"id": 1, "prompt": "a", "label": "safe"}]) for n in "ab"]
    assert [example.id for example in read_examples(paths)] == ["a:1", "b:1"]


def test_an_example_prints_as_one_short_escaped_line():
    example = Example(
        id="p:1", label="unsafe", category="fraud", messages=({"role": "user", "content": "a\n\x1b[31mb" + "c" * 90},)
    )
    assert repr(example) == "Example('p:1', unsafe, fraud, 'a\\n\\x1b[31mb" + "c" * 31 + "…')"
