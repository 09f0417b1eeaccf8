"""Scores are captured beside the counts, example by example, and change no count."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from families import build, hooks_left, shared
from moe_families import tiny_model
from word_tokenizer import TEMPLATE, make_tokenizer

from moe_ray.attribution.gate_attribution import gate_attribution
from moe_ray.attribution.saliency import router_weighted_saliency
from moe_ray.attribution.weight_attribution import weight_attribution
from moe_ray.config.capture import CaptureConfig
from moe_ray.errors import InputError
from moe_ray.models.tokenization import TokenizedRow, encode_answer, encode_row
from moe_ray.prompts.batches import Batch
from moe_ray.prompts.examples import Example
from moe_ray.routing import row_scores
from moe_ray.routing.capture_batches import capture_batches
from moe_ray.routing.count_tables import counts_digest, counts_to_table, table_to_counts
from moe_ray.routing.counts import SCORE_TENSORS, concat_counts

ALL = ("attribution", "gate", "reap", "refusal")
TEXTS = ("how are you", "thanks", "fine thanks how", "you are fine how are you")


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(chat_template=TEMPLATE, eos_token="<end>")


def batch(**changes):
    examples = [
        Example(
            id=f"e{number}",
            messages=({"role": "user", "content": text},),
            label="unsafe" if number % 2 else "safe",
            category="fraud",
            response="fine thanks" if number else None,
            target="how are you" if number % 2 else "fine",
        )
        for number, text in enumerate(TEXTS)
    ]
    return Batch(batch_idx=3, category="fraud", examples=tuple(replace(example, **changes) for example in examples))


@pytest.fixture(scope="module")
def captured(tokenizer):
    return capture_batches(
        shared("olmoe"), tokenizer, [batch()], CaptureConfig(generate=False, scores=ALL, weights=True, ids=True)
    )


def rows_of(counts, position, role):
    (row,) = np.flatnonzero((counts.in_batch_idx == position) & (counts.role == role))
    return row


def test_counts_weights_and_ids_are_those_of_a_capture_without_scores(tokenizer, captured):
    plain = capture_batches(
        shared("olmoe"), tokenizer, [batch()], CaptureConfig(generate=False, weights=True, ids=True)
    )
    np.testing.assert_array_equal(captured.counts_NLE, plain.counts_NLE)
    np.testing.assert_array_equal(captured.weights_NLE, plain.weights_NLE)
    assert all(np.array_equal(one, other) for one, other in zip(captured.ids, plain.ids, strict=True))
    assert all(getattr(plain, name) is None for name in SCORE_TENSORS)


def test_each_answer_has_its_own_scores_and_prompts_have_saliency_only(tokenizer, captured):
    model = shared("olmoe")
    for position, example in enumerate(batch().examples):
        row = encode_row(tokenizer, example.messages, example.response)
        prompt = rows_of(captured, position, "prompt")
        saliency_2LE = router_weighted_saliency(model, [row], pad_id=0)[0]
        np.testing.assert_allclose(captured.reap_NLE[prompt], saliency_2LE[0], rtol=1e-4)
        assert not captured.attribution_NLE[prompt].any()
        assert not captured.gate_NLE[prompt].any()
        if example.response is None:
            continue
        answer = rows_of(captured, position, "response")
        np.testing.assert_allclose(captured.reap_NLE[answer], saliency_2LE[1], rtol=1e-4)
        expected_LE = weight_attribution(model, row, pad_id=0)
        np.testing.assert_allclose(captured.attribution_NLE[answer], expected_LE, rtol=1e-4, atol=1e-7)
        expected_LE = gate_attribution(model, [row], pad_id=0)[0]
        np.testing.assert_allclose(captured.gate_NLE[answer], expected_LE, rtol=1e-3, atol=1e-6)


def test_refusals_are_the_targets_of_unsafe_examples_with_an_answer(tokenizer, captured):
    layers, k = captured.counts_NLE.shape[1], captured.num_experts_per_tok
    for position, example in enumerate(batch().examples):
        if example.response is None:
            continue
        answer = rows_of(captured, position, "response")
        if example.label == "safe":
            assert captured.refusal_tokens[answer] == 0
            assert not captured.refusal_NLE[answer].any()
            continue
        refusal = encode_answer(tokenizer, example.target)
        assert captured.refusal_tokens[answer] == len(refusal)
        assert captured.refusal_NLE[answer].sum() == len(refusal) * layers * k
        row = TokenizedRow(encode_row(tokenizer, example.messages, None).prompt_ids, refusal)
        expected_LE = gate_attribution(shared("olmoe"), [row], pad_id=0)[0]
        np.testing.assert_allclose(captured.gate_refusal_NLE[answer], expected_LE, rtol=1e-3, atol=1e-6)


def test_the_size_of_a_pass_changes_no_score(tokenizer, captured):
    small = capture_batches(
        shared("olmoe"),
        tokenizer,
        [batch()],
        CaptureConfig(generate=False, scores=ALL, weights=True, ids=True, tokens_per_forward=1),
    )
    for name in SCORE_TENSORS:
        np.testing.assert_allclose(getattr(small, name), getattr(captured, name), rtol=1e-3, atol=1e-6)


def test_an_unsafe_example_without_a_target_has_no_refusal_to_compare_with(tokenizer):
    with pytest.raises(InputError, match=r"capture.scores=refusal: got an unsafe example without a target"):
        capture_batches(
            shared("olmoe"),
            tokenizer,
            [batch(target=None)],
            CaptureConfig(generate=False, scores=("refusal",), max_bad_share=0),
        )


def test_tokens_of_the_template_are_left_out_of_refusals_too(tokenizer):
    config = CaptureConfig(generate=False, scores=("refusal",), template_tokens=False)
    counts = capture_batches(shared("olmoe"), tokenizer, [batch()], config)
    answer = rows_of(counts, 1, "response")
    assert counts.refusal_tokens[answer] == len(encode_answer(tokenizer, "how are you")) - 1


def test_nothing_is_left_on_the_model_and_it_may_be_one_that_trains(tokenizer):
    model = build("olmoe").train()
    capture_batches(model, tokenizer, [batch()], CaptureConfig(generate=False, scores=ALL))
    assert hooks_left(model) == 0
    assert model.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_an_infinite_score_is_the_fault_of_its_example(tokenizer, monkeypatch):
    one = np.full((2, 8), np.inf)
    monkeypatch.setattr(row_scores, "weight_attribution", lambda *args, **kwargs: one)
    with pytest.raises(InputError, match="a score of an expert is not finite"):
        capture_batches(shared("olmoe"), tokenizer, [batch()], CaptureConfig(generate=False, scores=("attribution",)))


def test_scores_are_stored_and_joined_like_counts(captured):
    table = counts_to_table(captured)
    back = table_to_counts(table)
    for name in (*SCORE_TENSORS, "refusal_tokens"):
        np.testing.assert_array_equal(getattr(back, name), getattr(captured, name))
    halves = [captured.take(np.arange(start, len(captured), 2)) for start in (0, 1)]
    joined = concat_counts(halves)
    np.testing.assert_array_equal(joined.attribution_NLE, captured.attribution_NLE)
    assert sum(map(counts_digest, halves)) % (1 << 64) == counts_digest(captured)
    assert counts_digest(captured) != counts_digest(replace(captured, gate_NLE=captured.gate_NLE * 2))
    assert "attribution, gate, reap, refusal, gate_refusal" in repr(captured)


def test_a_model_that_cannot_be_measured_is_refused_before_any_work(tokenizer, monkeypatch):
    monkeypatch.setattr(row_scores, "count_rows", None)
    with pytest.raises(InputError, match="has no tensors with one slice per expert"):
        capture_batches(
            tiny_model("dbrx"), tokenizer, [batch()], CaptureConfig(generate=False, scores=("attribution",))
        )
