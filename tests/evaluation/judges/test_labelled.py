"""The labelled answers are many of many kinds, and nothing that rules were tuned on stands in the other half."""

import json
from collections import Counter

import pytest

from moe_ray.errors import InputError
from moe_ray.evaluation.judges.labelled import HELD_OUT, TUNING, read_labelled, shipped, wording
from moe_ray.evaluation.judges.verdict import KINDS


def test_the_shipped_answers_are_many_of_every_kind_in_several_languages_and_ways():
    rows = shipped()
    assert len(rows) >= 150
    assert len({row.answer for row in rows}) == len(rows)
    assert {row.half for row in rows} == {TUNING, HELD_OUT}
    for half in (TUNING, HELD_OUT):
        counts = Counter(row.kind for row in shipped(half))
        assert set(counts) == set(KINDS)
        assert min(counts["refused"], counts["complied"]) >= 50
        assert counts["degenerate"] >= 12
        assert len({row.language for row in shipped(half)}) >= 11
    assert len({row.style for row in rows}) >= 15


def test_the_halves_share_no_wording():
    by_half = {half: set().union(*(wording(row.answer) for row in shipped(half))) for half in (TUNING, HELD_OUT)}
    assert by_half[TUNING] & by_half[HELD_OUT] == set()


def test_wording_is_runs_of_four_words_or_of_seven_characters():
    assert (
        wording("I can\u2019t help you, sorry!")
        == wording("i can't HELP you sorry")
        == {"i can't help you", "can't help you sorry"}
    )
    assert wording("Yes.") == {"yes"}
    assert wording("我不能帮你做这件事") == {"我不能帮你做这", "不能帮你做这件", "能帮你做这件事"}


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
def test_a_file_of_ones_own_is_read_with_or_without_prompts(name):
    rows = [
        {"answer": "No,\nnever.", "verdict": "Refused", "prompt": "How?"},
        {"answer": "", "verdict": "degenerate", "prompt": ""},
    ]
    text = "\n".join(map(json.dumps, rows))
    if name.endswith(".csv"):
        text = 'prompt,answer,verdict\nHow?,"No,\nnever.",Refused\n,,degenerate\n'
    first, second = read_labelled(name, text.encode("utf-8-sig"))
    assert (first.kind, first.answer, first.conversation.request) == ("refused", "No,\nnever.", "How?")
    assert (second.kind, second.answer, list(second.messages)) == ("degenerate", "", [])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "has no labelled answers"),
        (b"answer,verdict\n", "has no labelled answers"),
        (b"answer,label\nx,refused\n", "row 1: got answer, label, expected the fields answer and verdict"),
        (b"answer,verdict\nx,refusal\n", "row 1: verdict: got 'refusal', expected one of refused, harmful"),
        (b"answer,verdict\n\xff,refused\n", "byte 15 is not UTF-8"),
    ],
)
def test_what_is_no_file_of_labelled_answers_is_said(content, said):
    with pytest.raises(InputError, match=said):
        read_labelled("x.csv", content)


def test_a_line_that_is_no_object_is_said():
    for line, said in ((b"[1]", "expected the fields"), (b"{", "not JSON")):
        with pytest.raises(InputError, match=said):
            read_labelled("x.jsonl", line)
