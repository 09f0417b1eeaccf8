import json
import math

import numpy as np
import pandas as pd
import pytest
from families import NUM_EXPERTS, batch_masks, hooks_left, routing_spied, shared
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from moe_ray.config.evaluate import EvaluateConfig
from moe_ray.errors import InputError
from moe_ray.evaluation.evaluate import (
    answer_and_count,
    answer_examples,
    assign_reference_batches,
    rows_to_answer,
)
from moe_ray.evaluation.intervals import paired_difference, rate
from moe_ray.evaluation.metrics import paired_changes, prompt_clusters, summarise
from moe_ray.evaluation.routing_drift import routing_drift
from moe_ray.models.loss import text_losses
from moe_ray.models.tokenization import encode_prompt
from moe_ray.routing.counts import RoutingCounts
from moe_ray.routing.masking import route_through

LOSS_TOLERANCE = 1e-3
"""Nats, summed over an answer; rows of other lengths beside a row change its sums in the last bits of float32."""


@pytest.fixture(scope="module")
def tokenizer():
    words = {f"w{n}": n + 3 for n in range(61)} | {"<pad>": 0, "<bos>": 1, "<eos>": 2}
    inner = Tokenizer(models.WordLevel(words, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")


def held_out(num=10, batches=(0, 1)):
    generator = np.random.default_rng(0)

    def text(size):
        return " ".join(f"w{n}" for n in generator.integers(1, 61, size))

    return pd.DataFrame(
        {
            "id": [f"e{n}" for n in range(num)],
            "label": ["safe", "unsafe"] * (num // 2),
            "category": ["", "theft"] * (num // 2),
            "batch_idx": [batches[n % len(batches)] for n in range(num)],
            "messages": [json.dumps([{"role": "user", "content": text(n % 4 + 2)}]) for n in range(num)],
            "target": [text(n % 3 + 1) if n != 3 else None for n in range(num)],
            "target_complete": True,
            "pair": None,
        }
    )


CONFIG = EvaluateConfig(max_new_tokens=4, rows_per_forward=4, routing="both")
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
    model, rows = shared("olmoe"), rows_to_answer(held_out(2, batches=(0,)), "masked")
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
    rows = rows_to_answer(held_out(6, batches=(1,)), "masked")
    with routing_spied(model) as calls:
        answer_and_count(model, tokenizer, rows, CONFIG, masks)
    first_layer = [index for index, _ in calls][::2]
    assert set(np.unique(np.concatenate([index.flatten() for index in first_layer]))) == {0, 3, 7}


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
    rows = rows_to_answer(frame, "both")
    got = answer_and_count(model, tokenizer, rows, CONFIG, batch_masks(model, MASKS), count=True).routing
    tokens = [len(encode_prompt(tokenizer, json.loads(text))) for text in frame["messages"]]
    assert sorted(got.num_tokens) == sorted(tokens)
    assert (got.counts_NLE.sum(axis=2) == got.num_tokens[:, None] * got.num_experts_per_tok).all()
    assert got.counts_NLE.shape == (10, 2, NUM_EXPERTS)


def test_the_loss_of_a_text_is_that_of_predicting_each_token_after_the_first(tokenizer):
    model, texts = shared("olmoe"), ["w1 w2 w3 w4", "w5", "w9 w8 w7 w6 w5 w4"]
    got = text_losses(model, tokenizer, texts, rows_per_forward=2)
    assert got["num_tokens"].tolist() == [3, 0, 5]
    for text, loss in zip(texts, got["loss"], strict=True):
        first, _, rest = text.partition(" ")
        messages = json.dumps([{"role": "user", "content": first}])
        row = held_out(2).iloc[:1].assign(messages=messages, target=rest, target_complete=False)
        alone = answer_examples(model, tokenizer, row, EvaluateConfig(max_new_tokens=1))
        assert loss == pytest.approx(alone["target_loss"].iloc[0], abs=LOSS_TOLERANCE)


# Summaries of stored tables.


def judged(refused, *, labels=None, routing="natural", categories=None, batches=None, losses=None, pairs=None):
    num = len(refused)
    return pd.DataFrame(
        {
            "id": [f"e{n}" for n in range(num)],
            "label": labels or ["unsafe"] * num,
            "category": categories or [""] * num,
            "batch_idx": batches or [0] * num,
            "routing": routing,
            "messages": [f"m{n}" for n in range(num)],
            "pair": pairs or [None] * num,
            "refused": np.array(refused, dtype=bool),
            "target_loss": losses or [1.0] * num,
            "target_tokens": [2] * num,
        }
    )


def test_the_summary_counts_each_label_and_weighs_losses_by_tokens():
    answers = judged([1, 0, 1, 1, 0], labels=["safe", "safe", "unsafe", "unsafe", "unsafe"])
    answers["target_loss"], answers["target_tokens"] = [2.0, 4.0, 0.0, 0.0, 6.0], [1, 2, 0, 3, 6]
    got = summarise(answers)
    assert got["safe_refusal_rate"] == rate(1, 2).as_dict()
    assert got["unsafe_refusal_rate"] == rate(2, 3).as_dict()
    assert (got["target_loss"]["value"], got["target_loss"]["n"], got["target_loss"]["num_tokens"]) == (1.0, 4, 12)
    assert got["target_loss"]["low"] < 1.0 < got["target_loss"]["high"]
    assert (got["masked"], got["neutral_loss"], got["routing_drift"]) == (None, None, None)


def test_the_summary_is_divided_by_category_and_by_batch_and_by_routing():
    natural = judged([1, 0, 0, 0], categories=["theft", "theft", "", ""], batches=[4, 9, 9, 9])
    masked = judged([1, 1, 1, 0], routing="masked", categories=["theft", "theft", "", ""], batches=[4, 9, 9, 9])
    got = summarise(pd.concat([natural, masked]))
    assert {name: block["unsafe_refusal_rate"]["value"] for name, block in got["per_category"].items()} == {
        "theft": 0.5,
        "uncategorised": 0.0,
    }
    assert {name: block["unsafe_refusal_rate"]["n"] for name, block in got["per_batch"].items()} == {"4": 1, "9": 3}
    assert got["unsafe_refusal_rate"]["value"] == 0.25
    assert got["masked"]["unsafe_refusal_rate"]["value"] == 0.75
    assert got["masked"]["per_batch"]["9"]["unsafe_refusal_rate"]["value"] == pytest.approx(2 / 3)


def test_a_summary_can_be_stored_as_json():
    got = summarise(judged([True]), neutral=pd.DataFrame({"loss": [3.0], "num_tokens": [4]}))
    assert json.loads(json.dumps(got, allow_nan=False)) == got
    assert got["neutral_loss"]["value"] == 0.75


def test_a_change_is_paired_by_example_and_not_by_row_order():
    before, after = judged([0, 0, 0, 1], losses=[4.0] * 4), judged([1, 1, 0, 1], losses=[1.0, 2.0, 4.0, 4.0])
    got = paired_changes(before, after.iloc[[2, 0, 3, 1]])
    expected = paired_difference(np.array([0, 0, 0, 1], bool), np.array([1, 1, 0, 1], bool)).as_dict()
    assert got["unsafe_refusal_rate"] == expected
    assert got["target_loss"]["value"] == pytest.approx((1 + 2 + 4 + 4 - 16) / 8)
    assert got["safe_refusal_rate"]["n"] == 0
    assert got["per_batch"]["0"]["unsafe_refusal_rate"] == expected
    assert got["masked"] is None


def test_a_change_on_neutral_text_is_paired_by_text():
    texts = pd.DataFrame({"loss": [2.0, 8.0, 3.0], "num_tokens": [2, 4, 3]})
    later = texts.assign(loss=texts["loss"] + texts["num_tokens"] * 0.5)
    got = paired_changes(judged([0]), judged([0]), neutral_before=texts, neutral_after=later)
    assert (got["neutral_loss"]["value"], got["neutral_loss"]["low"], got["neutral_loss"]["n"]) == (0.5, 0.5, 3)


def test_answers_to_different_examples_are_not_compared():
    with pytest.raises(InputError, match="different examples"):
        paired_changes(judged([0, 1]), judged([0, 1]).assign(id=["e0", "e7"]))


def test_forms_of_one_request_count_once_in_an_interval():
    alone = judged([1, 0] * 8)
    paired = judged([1, 0] * 8, pairs=[str(n // 4) for n in range(16)])
    same_prompt = alone.assign(messages=paired["pair"])
    widths = [
        summarise(answers)["unsafe_refusal_rate"]["high"] - summarise(answers)["unsafe_refusal_rate"]["low"]
        for answers in (alone, judged([1, 1, 1, 1, 0, 0, 0, 0] * 2, pairs=[str(n // 4) for n in range(16)]))
    ]
    assert widths[1] > 1.3 * widths[0]
    assert prompt_clusters(paired).tolist() == prompt_clusters(same_prompt).tolist() == [n // 4 for n in range(16)]


def test_a_pair_and_a_repeated_prompt_join_into_one_cluster():
    rows = pd.DataFrame({"messages": ["a", "b", "b", "c", "d"], "pair": ["1", "1", "2", "2", None]})
    assert prompt_clusters(rows).tolist() == [0, 0, 0, 0, 1]


def test_routing_drift_is_the_change_of_activation_rates(tokenizer):
    model = shared("olmoe")
    rows = rows_to_answer(held_out(), "natural")
    before = answer_and_count(model, tokenizer, rows, CONFIG, count=True).routing
    assert routing_drift(before, before)["mean_absolute_change"] == {"value": 0, "n": 10, "low": 0, "high": 0}
    moved = before.take(np.arange(len(before)))
    moved.counts_NLE[:, 1, 2] += 3
    got = routing_drift(before, moved)
    change = 3 * len(before) / before.num_tokens.sum()
    assert got["largest_change"]["value"] == pytest.approx(change)
    assert (got["layer"], got["expert"], got["largest_change"]["n"]) == (before.layers[1], 2, 10)
    assert got["mean_absolute_change"]["value"] == pytest.approx(change / (2 * NUM_EXPERTS))


def routed(num_tokens, counts_NLE):
    rows = np.arange(len(num_tokens))
    names = {name: np.full(len(rows), "", dtype=object) for name in ("label", "category", "role")}
    return RoutingCounts(
        batch_idx=rows,
        in_batch_idx=rows,
        num_tokens=num_tokens,
        counts_NLE=counts_NLE,
        layers=(0,),
        num_experts_per_tok=1,
        **names,
    )


def drift_of_a_draw(generator):
    """Half of what goes to expert 0 goes to expert 1 afterwards, more or less so from prompt to prompt."""
    num_tokens = generator.integers(20, 60, 40)
    first = generator.binomial(num_tokens, 0.6)
    moved = generator.binomial(first, generator.beta(4, 4, 40))
    counts = [np.stack([kept, num_tokens - kept], axis=1)[:, None] for kept in (first, first - moved)]
    return routing_drift(*(routed(num_tokens, part) for part in counts))


def test_the_interval_of_routing_drift_holds_the_truth_nineteen_times_in_twenty():
    generator = np.random.default_rng(0)
    draws = [drift_of_a_draw(generator)["mean_absolute_change"] for _ in range(400)]
    assert np.mean([draw["low"] <= 0.3 <= draw["high"] for draw in draws]) == pytest.approx(0.95, abs=0.03)
    assert np.mean([draw["high"] - draw["low"] for draw in draws]) < 0.1


def test_prompts_that_are_not_independent_count_once_in_routing_drift():
    num_tokens, counts = np.array([10, 20, 30]), np.array([[[5, 5]], [[10, 10]], [[20, 10]]])
    later = np.array([[[2, 8]], [[10, 10]], [[11, 19]]])
    once = routing_drift(routed(num_tokens, counts), routed(num_tokens, later))
    twice = [routed(*(np.repeat(part, 2, axis=0) for part in (num_tokens, one))) for one in (counts, later)]
    got = routing_drift(*twice, clusters=np.repeat(np.arange(3), 2))
    for name in ("mean_absolute_change", "largest_change"):
        assert {**got[name], "n": 3} == pytest.approx(once[name])
    assert routing_drift(*twice)["largest_change"]["high"] < got["largest_change"]["high"]
    lone = routing_drift(*twice, clusters=np.zeros(6))["largest_change"]
    assert (lone["value"], lone["low"], lone["high"]) == (once["largest_change"]["value"], None, None)


def test_a_figure_of_nothing_is_none():
    got = summarise(judged([True], labels=["safe"]))
    assert got["unsafe_refusal_rate"] == {"value": None, "n": 0, "low": None, "high": None}
    assert not any(isinstance(value, float) and math.isnan(value) for value in got["target_loss"].values())
