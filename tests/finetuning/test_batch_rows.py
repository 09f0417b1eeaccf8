"""Rows are those of the batches' text, whatever was loaded and forgotten before, and are held in four bytes a token."""

from __future__ import annotations

from dataclasses import replace

import pytest
from text_batches import BATCHES
from word_tokenizer import make_tokenizer

from moe_ray.errors import InputError
from moe_ray.finetuning.batch_rows import BatchesInMemory, BatchRows, learning_rows, target_rows
from moe_ray.prompts.example_tables import batches_to_frame

EXPECTED = {batch.batch_idx: target_rows(make_tokenizer(), batch.examples) for batch in BATCHES}


class Spied(BatchesInMemory):
    def __init__(self, batches):
        super().__init__(batches)
        self.asked = []

    def read(self, batch_ids):
        self.asked.append(sorted(batch_ids))
        return super().read(batch_ids)


def batch_of(example_, **changes):
    return [replace(BATCHES[0], examples=(replace(example_, **changes),))]


def test_rows_come_back_as_they_were():
    rows = BatchRows(make_tokenizer(), BatchesInMemory(BATCHES), [4, 6])
    rows.load([4, 6])
    assert dict(rows) == EXPECTED
    assert all(type(token) is int for row in rows[4] for part in row[:2] for token in part)


def test_only_what_is_missing_is_read_and_what_is_not_asked_for_is_forgotten():
    source = Spied(BATCHES)
    rows = BatchRows(make_tokenizer(), source, [4, 6])
    for batch_ids in ([4], [4, 6], [6], [6], [4]):
        rows.load(batch_ids)
        assert [rows[batch_idx] for batch_idx in batch_ids] == [EXPECTED[batch_idx] for batch_idx in batch_ids]
    assert source.asked == [[4], [6], [4]]
    with pytest.raises(KeyError):
        rows[6]
    assert list(rows) == [4, 6]


def test_a_token_takes_four_bytes():
    rows = BatchRows(make_tokenizer(), BatchesInMemory(BATCHES), [4, 6])
    rows.load([4])
    num_tokens = sum(row.num_tokens for row in EXPECTED[4])
    assert rows.num_bytes == 4 * (num_tokens + 2 * len(EXPECTED[4]))


def test_a_row_without_an_answer_keeps_its_place():
    tokenizer = make_tokenizer()
    rows = BatchRows(tokenizer, BatchesInMemory(BATCHES), [4])
    rows.load([4])
    packed = rows._loaded[4]
    packed.sizes[0] = (packed.sizes[0].sum(), 0)
    assert rows[4][0] == (EXPECTED[4][0].prompt_ids + EXPECTED[4][0].answer_ids, [], None, False, 0)
    assert rows[4][1] == EXPECTED[4][1]


def test_the_survey_counts_the_bytes_of_what_is_stored():
    survey = BatchesInMemory(BATCHES).survey([6], lengths=True)
    frame = batches_to_frame(BATCHES[1:])
    assert survey.lengths == {6: sum(len(text.encode()) for text in [*frame["messages"], *frame["target"]])}
    assert survey.categories == {4: "fraud", 6: "theft"}
    assert BatchesInMemory(BATCHES).survey([6], lengths=False).lengths == {}


def test_longer_text_in_any_script_is_longer():
    (example,) = BATCHES[0].examples[:1]
    lengths = [
        BatchesInMemory(batch_of(example, target=target)).survey([4], lengths=True).lengths[4]
        for target in ("fine", "fine thanks", "спасибо, хорошо")
    ]
    assert lengths[0] + 7 == lengths[1] < lengths[2]


@pytest.mark.parametrize("target", [None, ""])
def test_a_missing_target_is_refused_where_the_batch_trains(target):
    batches = batch_of(BATCHES[0].examples[0], target=target)
    with pytest.raises(InputError, match=r"examples \['a'\] have no `target`"):
        BatchesInMemory(batches).survey([4], lengths=False)
    assert BatchesInMemory(batches).survey([6], lengths=False).categories == {4: "fraud"}
    with pytest.raises(InputError, match=r"examples \['a'\] have no `target`"):
        target_rows(make_tokenizer(), batches[0].examples)


# Labels


def test_a_row_knows_whether_its_prompt_is_unsafe():
    rows = BatchRows(make_tokenizer(), BatchesInMemory(BATCHES), [4, 6])
    rows.load([4, 6])
    for batch in BATCHES:
        assert [row.is_unsafe for row in rows[batch.batch_idx]] == [e.label == "unsafe" for e in batch.examples]


def test_a_batch_that_learns_from_unsafe_examples_has_their_rows_only():
    rows = BatchRows(make_tokenizer(), BatchesInMemory(BATCHES), [4, 6], learn_from="unsafe")
    rows.load([4, 6])
    expected = {batch_idx: [row for row in of_batch if row.is_unsafe] for batch_idx, of_batch in EXPECTED.items()}
    assert dict(rows) == expected
    assert all(0 < len(of_batch) < len(EXPECTED[batch_idx]) for batch_idx, of_batch in expected.items())


def test_a_batch_without_the_examples_that_it_learns_from_is_refused():
    safe = next(example for example in BATCHES[0].examples if example.label == "safe")
    (batch,) = batch_of(safe)
    with pytest.raises(InputError, match=r"batch 4 has no unsafe example to learn from; set finetune\.learn_from=all"):
        learning_rows(make_tokenizer(), batch, "unsafe")
    assert len(learning_rows(make_tokenizer(), batch, "all")) == 1
