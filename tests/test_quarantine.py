"""Examples that cannot be captured get a reason; batches go on without them."""

import json

import pandas as pd
import pytest

from moe_ray.config import ModelConfig
from moe_ray.errors import InputError
from moe_ray.loading import load_tokenizer
from moe_ray.quarantine import (
    EMPTY,
    NOT_ENCODED,
    TOO_LONG,
    Encoded,
    describe_capture,
    encode_example,
    quarantine_frame,
    without_quarantined,
)


@pytest.fixture(scope="module")
def tokenizer(tiny_model_path):
    return load_tokenizer(ModelConfig(path=str(tiny_model_path)))


def text(content, role="user"):
    return json.dumps([{"role": role, "content": content}])


def test_an_empty_prompt_is_rejected(tokenizer):
    assert encode_example(tokenizer, text(" \n"), "an answer", limit=None).reason == EMPTY


def test_a_prompt_that_breaks_the_chat_template_is_rejected(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('roles must alternate') }}")
    rejected = encode_example(tokenizer, text("hello"), None, limit=None)
    assert rejected.reason == NOT_ENCODED
    assert "roles must alternate" in rejected.detail


def test_an_example_longer_than_the_context_is_skipped_cut_or_an_error(tokenizer):
    whole = encode_example(tokenizer, text("one two three four"), "five six", limit=None)
    length = len(whole.row.prompt_ids) + len(whole.row.answer_ids)
    assert encode_example(tokenizer, text("one two three four"), "five six", limit=length) == whole
    skipped = encode_example(tokenizer, text("one two three four"), "five six", limit=length - 1)
    assert skipped.reason == TOO_LONG
    assert str(length) in skipped.detail
    for limit in (length - 1, len(whole.row.prompt_ids) - 1):
        cut = encode_example(tokenizer, text("one two three four"), "five six", limit=limit, too_long="truncate")
        assert isinstance(cut, Encoded)
        assert cut.full_length == length
        assert cut.row.prompt_ids + cut.row.answer_ids == (whole.row.prompt_ids + whole.row.answer_ids)[:limit]
    with pytest.raises(InputError, match=r"capture\.too_long"):
        encode_example(tokenizer, text("one two three four"), "five six", limit=length - 1, too_long="error")


def test_a_cut_example_with_tokens_of_the_template_only_is_rejected(tokenizer):
    cut = encode_example(tokenizer, text("hello"), None, limit=1, too_long="truncate", template_tokens=False)
    assert cut.reason == TOO_LONG


def test_a_batch_goes_on_without_its_quarantined_examples():
    examples = pd.DataFrame({"batch_idx": [0, 0, 1, 1], "in_batch_idx": [0, 1, 0, 1], "label": list("abcd")})
    row = {"batch_idx": 1, "in_batch_idx": 0, "id": "x", "label": "c", "category": "", "reason": EMPTY, "detail": ""}
    quarantined = quarantine_frame([row, row])
    assert len(quarantined) == 1
    assert list(without_quarantined(examples, quarantined)["label"]) == ["a", "b", "d"]
    assert len(without_quarantined(examples, quarantine_frame([]))) == 4


def test_the_number_of_quarantined_examples_is_said():
    notes = {"tokens": 1000, "examples": 50, "quarantined": 2, "truncated": 0, "padding_share": 0.05}
    said = describe_capture({**notes, "reasons": {TOO_LONG: 2}})
    assert "1,000 tokens of 48 examples" in said
    assert "2 examples in quarantine (2 too_long)" in said
