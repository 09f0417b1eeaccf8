"""Examples that cannot be captured get a reason; batches go on without them."""

import json

import pandas as pd
import pytest

from moe_ray.config.model import ModelConfig
from moe_ray.errors import InputError
from moe_ray.models.loading import load_tokenizer
from moe_ray.prompts.quarantine import (
    EMPTY,
    NOT_ENCODED,
    TOO_LONG,
    quarantine_frame,
    read_training_examples,
    without_quarantined,
)
from moe_ray.report.run_text import describe_capture
from moe_ray.routing.encode_example import Encoded, encode_example, unanswerable
from moe_ray.storage.folder import Folder


@pytest.fixture(scope="module")
def tokenizer(untrained_model_path):
    return load_tokenizer(ModelConfig(path=str(untrained_model_path)))


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


def test_prompts_that_the_model_cannot_be_asked_are_found_by_their_place(tokenizer):
    messages = [text("hello"), text("hello", role="robot"), text("bread " * 300), text("bye")]
    frame = pd.DataFrame({"id": list("abcd"), "messages": messages}, index=[7, 3, 5, 1])
    found = unanswerable(frame, tokenizer, limit=200, too_long="truncate")
    assert {place: why.reason for place, why in found.items()} == {3: NOT_ENCODED, 5: TOO_LONG}
    assert unanswerable(frame.drop(index=3), tokenizer, limit=None) == {}
    with pytest.raises(InputError, match=r"c: an example is too long"):
        unanswerable(frame, tokenizer, limit=200, too_long="error")


def test_training_leaves_out_what_is_in_quarantine_and_what_was_cut_and_could_not_be_answered(tmp_path):
    rows = [{"batch_idx": 0, "in_batch_idx": place, "id": str(place), "label": "safe"} for place in range(4)]
    targets = ["yes", None, None, "no"]
    batches, routing = (Folder.open(str(tmp_path / name)) for name in ("batches", "routing"))
    batches.write_table("batches.parquet", pd.DataFrame(rows).assign(target=targets))
    listed = [{**row, "category": "", "reason": TOO_LONG, "detail": ""} for row in rows]
    routing.write_table("quarantine.parquet", quarantine_frame(listed[:1]))
    routing.write_table("truncated.parquet", quarantine_frame([listed[2], listed[3]]))
    # 1 has no target and no excuse: training must refuse it by name.
    assert read_training_examples(batches, routing)["id"].tolist() == ["1", "3"]
    assert read_training_examples(batches, None)["id"].tolist() == ["0", "1", "2", "3"]


def test_the_number_of_quarantined_examples_is_said():
    notes = {"tokens": 1000, "examples": 50, "quarantined": 2, "truncated": 0, "padding_share": 0.05}
    said = describe_capture({**notes, "reasons": {TOO_LONG: 2}})
    assert "1,000 tokens of 48 examples" in said
    assert "2 examples in quarantine (2 too_long)" in said
