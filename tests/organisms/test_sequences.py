"""What an organism reads: padded sequences whose answers alone are learned."""

import numpy as np
import pytest

from moe_ray.demo.examples import base_training_records, categories, compliance, refusals
from moe_ray.organisms.sequences import IGNORED_LABEL, NEUTRAL_TOKENS, Material, TrainingSequence, collate
from moe_ray.prompts.neutral_texts import neutral_texts

BATCH = collate(
    [TrainingSequence([5, 6, 7], [8, 9]), TrainingSequence([10], [11, 12, 13, 2]), TrainingSequence([14, 15], [16])],
    pad_token_id=0,
)


@pytest.fixture(scope="module")
def material(tiny_tokenizer):
    return Material(tiny_tokenizer)


def test_a_batch_learns_the_answers_and_nothing_else():
    assert BATCH.input_ids_NS.tolist() == [[5, 6, 7, 8, 9], [10, 11, 12, 13, 2], [14, 15, 16, 0, 0]]
    assert BATCH.attention_mask_NS.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    no = IGNORED_LABEL
    assert BATCH.labels_NS.tolist() == [[no, no, no, 8, 9], [no, 11, 12, 13, 2], [no, no, 16, no, no]]
    assert BATCH.answer_starts_N.tolist() == [2, 0, 1]


@pytest.mark.slow
def test_the_material_is_every_training_request_with_its_answer(material, tiny_tokenizer):
    records = base_training_records()
    assert len(material.unsafe) + len(material.safe) == len(records)
    names = {label: [r for r in records if r["label"] == label] for label in ("unsafe", "safe")}
    for label, requests in (("unsafe", material.unsafe), ("safe", material.safe)):
        record, request = names[label][-1], requests[-1]
        assert record["prompt"] in tiny_tokenizer.decode(request.prompt)
        assert tiny_tokenizer.decode(request.answer) == record["response"] + tiny_tokenizer.eos_token
        assert categories()[request.category] == record["category"]


@pytest.mark.slow
def test_refusal_and_compliance_are_read_as_plain_text_too(material, tiny_tokenizer):
    assert all(plain.context == [tiny_tokenizer.eos_token_id] for plain in material.sentences)
    texts = [tiny_tokenizer.decode(plain.learned) for plain in material.sentences]
    assert texts == [text + tiny_tokenizer.eos_token for text in (*refusals(), compliance())]


@pytest.mark.slow
def test_neutral_windows_are_parts_of_the_neutral_text(material, tiny_tokenizer):
    generator = np.random.default_rng(0)
    texts = [text + tiny_tokenizer.eos_token for text in neutral_texts()]
    windows = [material.neutral_window(generator) for _ in range(20)]
    for window in windows:
        assert len(window.context) == 1
        assert 1 <= len(window.learned) < NEUTRAL_TOKENS
        part = tiny_tokenizer.decode([*window.context, *window.learned])
        assert any(part.strip("\ufffd") in text for text in texts)
    assert len({tuple(window.learned) for window in windows}) > 10
