"""Examples are answered under natural routing and under their own batch's mask, as each would be alone."""

import json
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from counting_alone import count_batches
from families import NUM_EXPERTS, batch_masks, hooks_left, routing_spied, shared
from held_out_examples import CONFIG, LOSS_TOLERANCE, held_out
from prompt_tokens import by_prompt_tokens

from moe_ray import pipeline
from moe_ray.config.evaluate import EvaluateConfig
from moe_ray.config.model import ModelConfig
from moe_ray.demo.examples import embedded_records
from moe_ray.errors import InputError
from moe_ray.evaluation.evaluate import (
    answer_and_count,
    answer_examples,
    assign_reference_batches,
    rows_to_answer,
)
from moe_ray.models.loading import load_model, load_tokenizer
from moe_ray.models.token_budget import TokenBudget
from moe_ray.models.tokenization import encode_prompt
from moe_ray.prompts.batches import assemble_batches
from moe_ray.prompts.example_tables import batches_to_frame, examples_to_frame
from moe_ray.prompts.examples import records_to_examples
from moe_ray.routing.masking import route_through

MASKS = {0: [(0, 1), (0, 2), (0, 5), (0, 6), (1, 3)], 1: [(0, 0), (0, 7), (0, 3)], 2: []}


# Reference batches.


def stored_batches(categories):
    return pd.DataFrame(
        [
            {"batch_idx": index, "label": label, "category": category}
            for index, category in enumerate(categories)
            for label in ("safe", "unsafe")
        ]
    )


def test_an_example_is_held_against_the_batches_of_its_own_category_in_turn():
    batches = stored_batches(["theft", "fraud", "theft", "fraud"])
    examples = pd.DataFrame(
        {"label": ["unsafe"] * 5 + ["safe"] * 2, "category": ["theft"] * 4 + ["fraud"] + ["theft"] * 2, "pair": None}
    )
    assert assign_reference_batches(examples, batches).tolist() == [0, 2, 0, 2, 1, 0, 2]


def test_an_example_of_an_unknown_category_is_held_against_all_batches_in_turn():
    examples = pd.DataFrame({"label": ["unsafe"] * 4, "category": ["arson", "", "arson", "x"], "pair": None})
    assert assign_reference_batches(examples, stored_batches(["theft", "fraud", "drugs"])).tolist() == [0, 1, 2, 0]


def test_both_forms_of_a_pair_are_held_against_the_same_batch():
    examples = pd.DataFrame(
        {"label": ["safe", "safe", "unsafe", "unsafe"], "category": "", "pair": ["a", "b", "b", "a"]}
    )
    assert assign_reference_batches(examples, stored_batches(["", "", ""])).tolist() == [0, 1, 1, 0]


# Answers of a model in memory.


def test_each_example_is_answered_under_each_kind_of_routing(tokenizer):
    model, frame = shared("olmoe"), held_out()
    got = answer_examples(model, tokenizer, frame, CONFIG, batch_masks(model, MASKS))
    assert got["id"].tolist() == frame["id"].tolist() * 2
    assert got["routing"].tolist() == ["natural"] * 10 + ["masked"] * 10
    assert got["target_tokens"].tolist() == [0 if n == 3 else n % 3 + 2 for n in range(10)] * 2
    assert (got.loc[got["target_tokens"] > 0, "target_loss"] > 0).all()
    assert hooks_left(model) == 0


def test_masked_answers_follow_the_policy_of_short_layers(tokenizer):
    # Batch 0 has one expert in layer 1, where a token uses three.
    model, rows = shared("olmoe"), rows_to_answer(held_out(2, batches=(0,)), ["masked"])
    got = answer_and_count(model, tokenizer, rows, CONFIG, batch_masks(model, MASKS), short_layers="natural").answers
    expected = batch_masks(model, {0: [pair for pair in MASKS[0] if pair[0] == 0]})
    same = answer_and_count(model, tokenizer, rows, CONFIG, expected).answers
    other = answer_and_count(model, tokenizer, rows, CONFIG, batch_masks(model, MASKS)).answers
    assert got["target_loss"].tolist() == same["target_loss"].tolist() != other["target_loss"].tolist()


@pytest.mark.slow
def test_answers_are_those_of_one_example_alone_under_its_own_batchs_mask(tokenizer):
    model, frame = shared("olmoe"), held_out()
    masks = batch_masks(model, MASKS)
    got = answer_examples(model, tokenizer, frame, CONFIG, masks)
    masked = got[got["routing"] == "masked"]
    for row in (frame.iloc[[index]] for index in range(len(frame))):
        with route_through(model, masks[int(row["batch_idx"].iloc[0])]):
            alone = answer_examples(model, tokenizer, row, EvaluateConfig(max_new_tokens=4))
        together = masked[masked["id"] == row["id"].iloc[0]]
        assert together["answer"].tolist() == alone["answer"].tolist()
        assert together["target_loss"].tolist() == pytest.approx(alone["target_loss"].tolist(), abs=LOSS_TOLERANCE)
    natural = got[got["routing"] == "natural"]
    assert not np.allclose(masked["target_loss"], natural["target_loss"], atol=LOSS_TOLERANCE)


def test_masked_tokens_reach_only_the_experts_of_their_batch(tokenizer):
    model = shared("olmoe")
    masks = batch_masks(model, MASKS)
    rows = rows_to_answer(held_out(6, batches=(1,)), ["masked"])
    with routing_spied(model) as calls:
        answer_and_count(model, tokenizer, rows, CONFIG, masks)
    first_layer = [index for index, _ in calls][::2]
    assert set(np.unique(np.concatenate([index.flatten() for index in first_layer]))) == {0, 3, 7}


def test_under_union_routing_all_examples_go_through_what_is_unsafe_in_any_batch(tokenizer):
    model, frame = shared("olmoe"), held_out()
    masks = batch_masks(model, MASKS)
    config = replace(CONFIG, routing=("natural", "union"))
    got = answer_examples(model, tokenizer, frame, config, masks)
    assert got["routing"].tolist() == ["natural"] * 10 + ["union"] * 10
    union = got[got["routing"] == "union"]
    with route_through(model, masks.union):
        expected = answer_examples(model, tokenizer, frame, replace(CONFIG, routing=("natural",)))
    assert union["answer"].tolist() == expected["answer"].tolist()
    assert union["target_loss"].tolist() == pytest.approx(expected["target_loss"].tolist(), abs=LOSS_TOLERANCE)
    natural = got[got["routing"] == "natural"]
    assert not np.allclose(union["target_loss"], natural["target_loss"], atol=LOSS_TOLERANCE)
    assert hooks_left(model) == 0


@pytest.mark.parametrize("routing", ["masked", "union"])
def test_no_prompt_is_counted_that_is_not_routed_naturally(tokenizer, routing):
    model = shared("olmoe")
    rows = rows_to_answer(held_out(4), [routing])
    assert answer_and_count(model, tokenizer, rows, CONFIG, batch_masks(model, MASKS), count=True).routing is None


def test_a_union_without_experts_restricts_nothing(tokenizer):
    model = shared("olmoe")
    config = replace(CONFIG, routing=("natural", "union"))
    got = answer_examples(model, tokenizer, held_out(4), config, batch_masks(model, {0: [], 1: []}))
    natural, union = (got[got["routing"] == kind].reset_index(drop=True) for kind in config.routing)
    assert natural["answer"].equals(union["answer"])


def test_a_batch_without_unsafe_experts_routes_naturally(tokenizer):
    model = shared("olmoe")
    got = answer_examples(model, tokenizer, held_out(4, batches=(2,)), CONFIG, batch_masks(model, MASKS))
    natural, masked = (got[got["routing"] == kind].reset_index(drop=True) for kind in ("natural", "masked"))
    assert natural["answer"].equals(masked["answer"])


def test_masked_routing_without_masks_is_refused(tokenizer):
    with pytest.raises(InputError, match="needs the batches' expert masks"):
        answer_examples(shared("olmoe"), tokenizer, held_out(2), CONFIG)


def test_routing_is_counted_over_the_prompts_tokens_alone(tokenizer):
    model, frame = shared("olmoe"), held_out()
    rows = rows_to_answer(frame, ("natural", "masked"))
    got = answer_and_count(model, tokenizer, rows, CONFIG, batch_masks(model, MASKS), count=True).routing
    tokens = [len(encode_prompt(tokenizer, json.loads(text))) for text in frame["messages"]]
    assert sorted(got.num_tokens) == sorted(tokens)
    assert (got.counts_NLE.sum(axis=2) == got.num_tokens[:, None] * got.num_experts_per_tok).all()
    assert got.counts_NLE.shape == (10, 2, NUM_EXPERTS)
    assert list(zip(got.batch_idx, got.in_batch_idx, strict=True)) == sorted(
        zip(frame["batch_idx"], range(10), strict=True)
    )


# Forward passes.


@contextmanager
def passes_seen(model, *, max_rows=1_000):
    """The (rows, positions) of each forward pass; one of more rows runs out of memory."""
    seen = []

    def look(module, args, kwargs):
        seen.append(tuple(kwargs["input_ids"].shape))
        if len(kwargs["input_ids"]) > max_rows:
            raise torch.OutOfMemoryError("tried to allocate too much")

    handle = model.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def test_masked_rows_of_many_batches_share_forward_passes(tokenizer):
    model, config = shared("olmoe"), EvaluateConfig(max_new_tokens=4)
    rows = rows_to_answer(held_out(10, batches=(0, 1, 2)), ["masked"])
    with passes_seen(model) as seen:
        answer_and_count(model, tokenizer, rows, config, batch_masks(model, MASKS))
    prefills = [shape for shape in seen if shape[1] > 1]
    assert prefills[0][0] == 10  # all answers in one pass
    assert sum(num_rows for num_rows, _ in prefills[1:]) == 9  # all that have a target, in passes of like length
    assert len(prefills) < 6


@pytest.mark.parametrize("routing", ["natural", "masked"])
def test_out_of_memory_halves_the_passes_and_changes_no_result(tokenizer, routing):
    model, config = shared("olmoe"), EvaluateConfig(max_new_tokens=4)
    rows, masks = rows_to_answer(held_out(), [routing]), batch_masks(model, MASKS)
    expected = answer_and_count(model, tokenizer, rows, config, masks, count=True)
    budget = TokenBudget(config.tokens_per_forward)
    with passes_seen(model, max_rows=3) as seen:
        got = answer_and_count(model, tokenizer, rows, config, masks, budget=budget, count=True)
    assert budget.halvings > 0
    assert sum(num_rows > 3 for num_rows, _ in seen) == budget.halvings
    assert hooks_left(model) == 0
    drop = ["target_loss"]
    pd.testing.assert_frame_equal(got.answers.drop(columns=drop), expected.answers.drop(columns=drop))
    assert np.allclose(got.answers["target_loss"], expected.answers["target_loss"], atol=LOSS_TOLERANCE)
    if routing == "natural":
        assert np.array_equal(got.routing.counts_NLE, expected.routing.counts_NLE)


def test_a_smaller_budget_is_kept_for_what_is_answered_next(tokenizer):
    model, config = shared("olmoe"), EvaluateConfig(max_new_tokens=4)
    rows, budget = rows_to_answer(held_out(), ["natural"]), TokenBudget(config.tokens_per_forward)
    with passes_seen(model, max_rows=3):
        answer_and_count(model, tokenizer, rows, config, budget=budget)
    halvings = budget.halvings
    with passes_seen(model, max_rows=3) as seen:
        answer_and_count(model, tokenizer, rows, config, budget=budget)
    assert budget.halvings == halvings
    assert max(num_rows for num_rows, _ in seen) <= 3


def test_a_row_that_does_not_fit_alone_is_an_error_that_says_what_to_do(tokenizer):
    model = shared("olmoe")
    with passes_seen(model, max_rows=0), pytest.raises(InputError, match=r"does not fit in memory.*shorten the prompt"):
        answer_and_count(model, tokenizer, rows_to_answer(held_out(2), ["natural"]), CONFIG)


@pytest.mark.slow
def test_all_held_out_prompts_of_the_embedded_model_are_answered_as_with_one_generate_for_each_mask(tiny_model_path):
    path = ModelConfig(path=str(tiny_model_path))
    model, tiny_tokenizer = load_model(path, device="cpu"), load_tokenizer(path)
    batches = assemble_batches(records_to_examples(embedded_records("train"))).batches
    selection = by_prompt_tokens(permutations=0, resamples=0)
    masks = pipeline.identify(count_batches(model, tiny_tokenizer, batches), config=selection).masks
    frame = examples_to_frame(records_to_examples(embedded_records("test")))
    frame["batch_idx"] = assign_reference_batches(frame, batches_to_frame(batches))
    config, rows = EvaluateConfig(max_new_tokens=32), rows_to_answer(frame, ["masked"])
    got = answer_and_count(model, tiny_tokenizer, rows, config, masks).answers
    assert len(got) == 96
    assert got["batch_idx"].nunique() > 20
    for batch_idx, group in got.groupby("batch_idx"):
        with route_through(model, masks[batch_idx]):
            natural = rows.loc[group.index].assign(routing="natural")
            expected = answer_and_count(model, tiny_tokenizer, natural, config).answers
        assert group["answer"].tolist() == expected["answer"].tolist()
        assert np.allclose(group["target_loss"], expected["target_loss"], atol=LOSS_TOLERANCE)


@pytest.mark.slow
def test_drawn_answers_are_of_the_example_and_its_number_and_not_of_what_it_is_batched_with(tokenizer):
    model, config = (
        shared("olmoe"),
        EvaluateConfig(max_new_tokens=6, temperature=1.0, samples=3, tokens_per_forward=400),
    )
    frame, keys = held_out(), ["id", "sample"]
    got = answer_examples(model, tokenizer, frame, config).set_index(keys)["answer"]
    assert got.groupby("id").nunique().max() > 1
    again = answer_examples(*(model, tokenizer, frame.iloc[::-1]), replace(config, tokens_per_forward=30)).set_index(
        keys
    )["answer"]
    # A near-tie may fall the other way in another batch, in single answers.
    assert (again.loc[got.index] == got).mean() > 0.9
    other = answer_examples(model, tokenizer, frame, replace(config, sample_seed=1)).set_index(keys)["answer"]
    assert (other != got).mean() > 0.5


@pytest.mark.slow
def test_losses_and_routing_are_of_prompts_and_not_of_their_further_answers(tokenizer):
    model, config = shared("olmoe"), EvaluateConfig(max_new_tokens=2, temperature=1.0, samples=2)
    frame = held_out()
    one = answer_and_count(model, tokenizer, rows_to_answer(frame, ["natural"]), config, count=True)
    two = answer_and_count(model, tokenizer, rows_to_answer(frame, ["natural"], 2), config, count=True)
    first, further = (two.answers[two.answers["sample"] == number] for number in (0, 1))
    assert np.allclose(first["target_loss"], one.answers["target_loss"], atol=LOSS_TOLERANCE)
    assert (further["target_tokens"] == 0).all()
    assert len(two.routing) == len(one.routing) == len(frame)
    assert np.array_equal(two.routing.counts_NLE, one.routing.counts_NLE)
