"""The whole check on models written by hand: it says cause where there is one, and none where there is none."""

from __future__ import annotations

import functools

import causal_model
import numpy as np
import pytest

import moe_ray
from moe_ray.errors import InputError, NothingSelected
from moe_ray.experts import Expert, masks_from_experts
from moe_ray.models.expert_copies import EXPERTS_ARE_COPIES

BATCHES = causal_model.batches(6)
HELD_OUT = [example for name in causal_model.CATEGORIES for example in causal_model.examples(name, 8, start=60)]
MASKS = masks_from_experts(
    {batch.batch_idx: [Expert(0, causal_model.OWN_EXPERT[batch.category])] for batch in BATCHES},
    layers=(0,),
    num_experts=causal_model.NUM_EXPERTS,
)


@functools.cache
def model_and_risk(kind):
    model, tokenizer = causal_model.build(kind), causal_model.tokenizer()
    counts = moe_ray.capture(model, tokenizer, BATCHES)
    return model, tokenizer, moe_ray.identify(counts, permutations=0, resamples=0, threshold=0.0).risk


def ablated(kind, *, masks=MASKS, held_out=HELD_OUT, **settings):
    model, tokenizer, risk = model_and_risk(kind)
    settings = {"relabellings": 1000, "generate": False, "max_new_tokens": 4} | settings
    return moe_ray.ablate(model, tokenizer, BATCHES, masks, risk, held_out=held_out, **settings)


@pytest.fixture(scope="module")
def causal():
    return ablated("causal")


@pytest.mark.slow
def test_a_model_answers_through_its_experts_as_written():
    answers = ablated("spread").answers
    of_label = answers.groupby("label")["answer"].unique()
    assert sorted(of_label["unsafe"]) == ["do-fraud", "do-theft"]
    assert list(of_label["safe"]) == ["answer"]


@pytest.mark.slow
def test_an_expert_that_alone_knows_the_unsafe_answers_is_the_cause(causal):
    assert causal.verdict == "causal"
    assert set(causal.batches["verdict"]) == {"causal"}
    table = causal.table.set_index("set")
    assert table.loc["selected", "unsafe"] > 1
    assert abs(table.loc["selected", "safe"]) < 1e-6
    assert abs(table.loc["matched", "specific"]) < 0.1
    assert table.loc["other", "lift_low"] > 1
    assert ": causal; better than" in causal.in_words()


@pytest.mark.slow
def test_what_every_expert_knows_is_not_what_makes_the_difference():
    found = ablated("spread")
    assert found.verdict == "not"
    assert set(found.batches["verdict"]) == {"not"}
    assert "routing differs, but these experts are not what makes the difference" in found.in_words()


@pytest.mark.slow
def test_experts_that_the_answers_do_not_need_are_not_the_cause():
    wrong = masks_from_experts(
        {batch.batch_idx: [Expert(0, 5)] for batch in BATCHES}, layers=(0,), num_experts=causal_model.NUM_EXPERTS
    )
    assert ablated("causal", masks=wrong).verdict == "not"


def test_equal_experts_are_said_to_be_equal_and_nothing_is_measured():
    found = ablated("copies")
    assert found.verdict == "copies"
    assert found.cost.forwards == 0
    assert EXPERTS_ARE_COPIES in found.in_words()


@pytest.mark.slow
def test_forced_through_the_selection_safe_answers_are_lost_and_unsafe_ones_kept(causal):
    forced = causal.table.set_index("set").loc["forced"]
    assert abs(forced["unsafe"]) < 1e-6
    assert forced["safe"] > 1


def test_a_single_expert_alone_loses_as_much_as_the_selection_that_it_is(causal):
    own = causal.batches.set_index("batch_idx")["specific"]
    alone = causal.experts.set_index("batch_idx")["alone"]
    assert np.allclose(alone, own.loc[alone.index])


@pytest.mark.slow
def test_prompts_that_did_not_choose_the_experts_are_asked_where_there_are_any(causal):
    assert set(causal.answers["id"]) == {example.id for example in HELD_OUT}
    own = {example.id for batch in BATCHES for example in batch.examples}
    assert set(ablated("causal", held_out=()).answers["id"]) == own
    assert set(ablated("causal", source="batch").answers["id"]) == own


def test_only_so_many_batches_are_checked(causal):
    assert len(causal.batches) == 6
    assert ablated("causal", max_batches=2).batches["category"].tolist() == ["fraud", "theft"]


@pytest.mark.slow
def test_the_same_seed_gives_the_same_findings(causal):
    again = ablated("causal")
    assert again.effects.equals(causal.effects)
    assert again.table.equals(causal.table)


def test_without_any_selected_expert_there_is_nothing_to_ablate():
    none = masks_from_experts({batch.batch_idx: [] for batch in BATCHES}, layers=(0,), num_experts=8)
    with pytest.raises(NothingSelected, match="no batch has an unsafe expert"):
        ablated("causal", masks=none)


def test_a_selection_that_leaves_no_expert_for_a_token_is_refused():
    everything = masks_from_experts(
        {batch.batch_idx: [Expert(0, expert) for expert in range(8)] for batch in BATCHES}, layers=(0,), num_experts=8
    )
    with pytest.raises(NothingSelected, match="as many experts are left as a token uses"):
        ablated("causal", masks=everything)


def test_masks_of_batches_that_are_not_given_are_refused():
    model, tokenizer, risk = model_and_risk("causal")
    with pytest.raises(InputError, match=r"masks of batches \[5\]"):
        moe_ray.ablate(model, tokenizer, BATCHES[:5], MASKS, risk)
