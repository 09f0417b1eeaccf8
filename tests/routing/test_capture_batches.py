"""Batches are captured in one process as a run captures them: bad examples are left out, nothing else moves."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from counting_alone import count_batches
from families import build, hooks_left, made_equal, shared
from thinking_templates import QWEN3, thinking_tokenizer
from word_tokenizer import TEMPLATE, make_tokenizer

from moe_ray.config.capture import CaptureConfig
from moe_ray.errors import InputError
from moe_ray.models.generation import Response, generate_responses
from moe_ray.models.tokenization import TokenizedRow, encode_row
from moe_ray.prompts.batches import Batch
from moe_ray.prompts.examples import Example
from moe_ray.routing.capture_batches import capture_batches, longest_prompt, with_response

WORDS = ("how are you", "thanks", "fine thanks how", "you are fine how are you", "are", "fine fine fine fine")
LENIENT = CaptureConfig(generate=False, max_bad_share=0.5, tokens_per_forward=24)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(chat_template=TEMPLATE, eos_token="<end>")


def example(number, text, response=None):
    messages = ({"role": "user", "content": text},)
    label = "unsafe" if number % 2 else "safe"
    return Example(
        id=f"e{number}", messages=messages, label=label, category="fraud", response=response, pair=str(number // 2)
    )


def some_batches(*extra):
    examples = [example(number, text) for number, text in enumerate(WORDS)]
    examples[0] = replace(examples[0], response="fine thanks")
    return [
        Batch(batch_idx=9, category="fraud", examples=tuple(examples[:3])),
        Batch(batch_idx=4, category="fraud", examples=(*extra, *examples[3:])),
    ]


TOO_LONG = example(20, "fine " * 70)


def keys(counts):
    return list(zip(counts.batch_idx.tolist(), counts.in_batch_idx.tolist(), counts.role.tolist(), strict=True))


def test_counts_do_not_depend_on_the_size_of_a_forward_pass(tokenizer):
    batches = some_batches()
    expected = count_batches(shared("olmoe"), tokenizer, batches, weights=True, ids=True)
    for tokens in (1, 30, 8192):
        config = CaptureConfig(generate=False, tokens_per_forward=tokens, weights=True, ids=True)
        got = capture_batches(shared("olmoe"), tokenizer, batches, config)
        assert np.array_equal(got.counts_NLE, expected.counts_NLE)
        assert keys(got) == keys(expected)
        assert got.pair.tolist() == expected.pair.tolist()
        np.testing.assert_allclose(got.weights_NLE, expected.weights_NLE, atol=1e-5)  # float32 sums in another order
        assert all(np.array_equal(one, other) for one, other in zip(got.ids, expected.ids, strict=True))


def test_an_example_that_is_too_long_is_left_out_and_the_others_keep_their_ids(tokenizer, caplog):
    with caplog.at_level(logging.WARNING):
        got = capture_batches(shared("olmoe"), tokenizer, some_batches(TOO_LONG), LENIENT)
    assert "1 of 7 examples cannot be captured and are left out: 'e20'" in caplog.text
    assert [key[:2] for key in keys(got) if key[0] == 4] == [(4, 1), (4, 2), (4, 3)]


def test_too_many_bad_examples_are_refused(tokenizer):
    with pytest.raises(
        InputError, match=r"1 of 7 .* a share of 0\.1; the first is 'e20' \(too_long: .*capture.max_bad_share"
    ):
        capture_batches(shared("olmoe"), tokenizer, some_batches(TOO_LONG), replace(LENIENT, max_bad_share=0.1))


def test_a_long_example_can_be_cut_or_refused(tokenizer):
    model = shared("olmoe")
    cut = capture_batches(model, tokenizer, some_batches(TOO_LONG), replace(LENIENT, too_long="truncate"))
    assert cut.num_tokens.max() == model.config.max_position_embeddings
    with pytest.raises(InputError, match=r"^e20: an example is too long"):
        capture_batches(model, tokenizer, some_batches(TOO_LONG), replace(LENIENT, too_long="error"))


def test_an_example_that_fails_alone_is_left_out_and_no_hook_stays(tokenizer, caplog):
    model = build("olmoe")
    body = model.model.norm.forward
    model.model.norm.forward = lambda hidden: (
        body(hidden) if hidden.shape[1] != 9 else torch.full_like(hidden, torch.nan)
    )
    with caplog.at_level(logging.WARNING):
        got = capture_batches(model, tokenizer, some_batches(), LENIENT)
    del model.model.norm.forward
    assert "cannot be captured" in caplog.text
    assert (4, 0, "prompt") not in keys(got)
    assert hooks_left(model) == 0


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_examples_without_a_response_are_counted_with_the_models_own(tokenizer, temperature):
    model, batches = shared("olmoe"), some_batches()
    config = CaptureConfig(generate=True, max_new_tokens=5, temperature=temperature)
    got = capture_batches(model, tokenizer, batches, config, seed=1)
    assert sum(role == "response" for *_, role in keys(got)) == len(WORDS)
    again = capture_batches(model, tokenizer, batches, replace(config, tokens_per_forward=20), seed=1)
    assert np.array_equal(got.counts_NLE, again.counts_NLE)
    # The response that an example came with, and its end.
    assert got.num_tokens[keys(got).index((9, 0, "response"))] == 3
    if not temperature:
        row = encode_row(tokenizer, batches[1].examples[1].messages, None)
        (response,) = generate_responses(model, tokenizer, [row.prompt_ids], max_new_tokens=5)
        assert got.num_tokens[keys(got).index((4, 1, "response"))] == len(response.ids)


def test_an_answer_leaves_room_for_no_longer_prompt_and_one_that_leaves_none_is_refused():
    config = CaptureConfig(max_new_tokens=60)
    assert longest_prompt(100, None, config) == 40
    assert longest_prompt(100, "yes", config) == longest_prompt(100, None, replace(config, generate=False)) == 100
    assert longest_prompt(0, None, config) == 0
    with pytest.raises(InputError, match=r"capture\.max_new_tokens: got 60, which leaves no room for a prompt in 60"):
        longest_prompt(60, None, config)


def test_the_end_of_a_generated_response_belongs_to_the_template(tokenizer):
    row = encode_row(tokenizer, ({"role": "user", "content": "how"},), None, template_tokens=False)
    (response,) = generate_responses(shared("olmoe"), tokenizer, [row.prompt_ids], max_new_tokens=3)
    ended = response._replace(ids=[5, 6, 1], ended=True)
    assert with_response(row, ended).counted == [*row.counted, True, True, False]
    assert with_response(row, ended._replace(ended=False)).counted == [*row.counted, True, True, True]
    assert with_response(TokenizedRow([3], []), ended) == TokenizedRow([3], [5, 6, 1])


def test_the_training_mode_is_restored(tokenizer):
    model = build("olmoe").train()
    capture_batches(model, tokenizer, some_batches(), CaptureConfig(generate=False))
    assert model.training


def test_a_model_whose_experts_are_copies_is_counted_and_said_to_be_one(tokenizer, caplog):
    with caplog.at_level(logging.WARNING):
        capture_batches(shared("olmoe"), tokenizer, some_batches(), LENIENT)
        assert "are equal" not in caplog.text
        capture_batches(made_equal("olmoe"), tokenizer, some_batches(), LENIENT)
    assert "capture: All experts of a layer are equal" in caplog.text


def test_the_thought_of_a_response_is_counted_apart_from_its_answer():
    tokenizer = thinking_tokenizer(QWEN3)
    ids = tokenizer("<think>\nhm\n</think>\n\nNo.<|im_end|>", add_special_tokens=False)["input_ids"]
    response = Response(ids, "No.", True, num_thought=len(ids) - 4, thought="hm")
    row = with_response(TokenizedRow([3, 4], [], [True, False]), response)
    assert (row.num_thought, tokenizer.decode(row.answer_ids)) == (len(ids) - 4, "No.<|im_end|>")
    assert row.prompt_ids + row.answer_ids == [3, 4, *ids]
    assert row.counted == [True, False] + [True] * (len(ids) - 1) + [False]


def test_responses_with_thoughts_give_rows_of_all_three_roles():
    tokenizer = make_tokenizer(chat_template=TEMPLATE, eos_token="<end>")
    example = Example(
        id="a", messages=({"role": "user", "content": "how"},), label="safe", response="[THINK] are [/THINK] you"
    )
    counts = count_batches(shared("olmoe"), tokenizer, [Batch(batch_idx=0, category="", examples=(example,))])
    assert dict(zip(counts.role, counts.num_tokens.tolist(), strict=True)) == {"prompt": 4, "response": 2, "thought": 3}
