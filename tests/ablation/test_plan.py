"""Which batches and prompts are taken: spread over categories, no prompt of training where others are there."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pandas as pd
import pytest
from prompt_tokens import by_prompt_tokens

from moe_ray.ablation.expert_sets import BUSIEST, FORCED, GLOBAL, MATCHED, OTHER, SELECTED
from moe_ray.ablation.plan import chosen_batches, plan_batches, prompts_of_batches
from moe_ray.config.ablate import AblateConfig
from moe_ray.errors import NothingSelected
from moe_ray.experts import Expert, masks_from_experts
from moe_ray.identification.identify import identify
from moe_ray.prompts.batches import MIXED
from moe_ray.testing.simulated_counts import Population, simulate

CONFIG = AblateConfig(prompts=4)


def masks_of(num_batches, empty=()):
    selected = {batch: [] if batch in empty else [Expert(0, 1), Expert(1, batch % 4)] for batch in range(num_batches)}
    return masks_from_experts(selected, layers=(0, 1), num_experts=8)


def rows(number, label, category, *, start=0, batch_idx=-1, pairs=False):
    return [
        {
            "id": f"{category}-{label}-{place}", "label": label, "category": category, "batch_idx": batch_idx,
            "pair": f"{category}-{place}" if pairs else None,
            "messages": json.dumps([{"role": "user", "content": f"{category} {label} {place}"}]),
        }
        for place in range(start, start + number)
    ]  # fmt: skip


def own_of(batches):
    return pd.DataFrame(
        [
            row
            for batch, name in batches.items()
            for label in ("safe", "unsafe")
            for row in rows(6, label, name, start=100 * batch, batch_idx=batch)
        ]
    )


def asked(batches, held_out, config=CONFIG):
    frame = pd.DataFrame(held_out) if held_out else None
    return prompts_of_batches(batches, own_of(batches), frame, config, seed=0)


def test_batches_are_spread_over_categories_and_those_without_experts_are_not_taken():
    categories = {batch: "abc"[batch // 10] for batch in range(30)}
    masks = masks_of(30, empty=(0, 1, 2))
    chosen = chosen_batches(masks, categories, 6)
    assert Counter(categories[batch] for batch in chosen) == {"a": 2, "b": 2, "c": 2}
    assert chosen == sorted(set(chosen) - {0, 1, 2})
    assert chosen_batches(masks, categories, 0) == list(range(3, 30))


def test_with_fewer_batches_than_categories_each_is_of_another_one():
    categories = {batch: str(batch // 2) for batch in range(12)}
    chosen = chosen_batches(masks_of(12), categories, 3)
    assert len({categories[batch] for batch in chosen}) == len(chosen) == 3


def test_a_small_category_gives_what_it_has_and_the_others_the_rest():
    categories = {0: "a", **dict.fromkeys(range(1, 10), "b")}
    assert chosen_batches(masks_of(10), categories, 4)[0] == 0
    assert len(chosen_batches(masks_of(10), categories, 4)) == 4


def test_held_out_prompts_of_the_category_are_asked_as_many_of_each_label():
    held_out = rows(9, "unsafe", "a") + rows(9, "safe", "a") + rows(9, "unsafe", "b") + rows(9, "safe", "b")
    found = asked({0: "a", 1: "b"}, held_out)
    for batch, name in ((0, "a"), (1, "b")):
        source, prompts = found[batch]
        assert source == "held_out"
        assert prompts["label"].tolist() == ["unsafe"] * 4 + ["safe"] * 4
        assert prompts["id"].str.startswith(name).all()


def test_batches_of_a_category_share_prompts_out_where_there_are_enough_and_else_share_all():
    many = asked({0: "a", 1: "a"}, rows(8, "unsafe", "a") + rows(8, "safe", "a"))
    few = asked({0: "a", 1: "a"}, rows(7, "unsafe", "a") + rows(7, "safe", "a"))
    assert not set(many[0][1]["id"]) & set(many[1][1]["id"])
    assert few[0][1].equals(few[1][1])


@pytest.mark.parametrize("config", [CONFIG, AblateConfig(prompts=4, source="batch")])
def test_with_too_few_held_out_or_where_asked_a_batch_is_asked_its_own(config):
    held_out = rows(3, "unsafe", "a") + rows(9, "safe", "a") + rows(9, "unsafe", "b") + rows(9, "safe", "b")
    found = asked({0: "a", 1: "b"}, held_out, config)
    assert found[0][0] == "batch"
    assert found[1][0] == config.source
    assert set(found[0][1]["id"]) <= set(own_of({0: "a"})["id"])


def test_a_category_without_safe_prompts_of_its_own_is_asked_others():
    found = asked({0: "a", 1: "b"}, rows(9, "unsafe", "a") + rows(9, "unsafe", "b") + rows(9, "safe", ""))
    assert {source for source, _ in found.values()} == {"held_out"}
    safe = [set(prompts.loc[prompts["label"] == "safe", "id"]) for _, prompts in found.values()]
    assert not safe[0] & safe[1]


def test_mixed_batches_are_asked_prompts_of_every_category():
    found = asked({0: MIXED, 1: MIXED}, rows(9, "unsafe", "a") + rows(9, "safe", "b"))
    assert {source for source, _ in found.values()} == {"held_out"}


def test_the_forms_of_a_pair_are_asked_together():
    held_out = rows(9, "unsafe", "a", pairs=True) + rows(9, "safe", "a", pairs=True)
    _, prompts = asked({0: "a"}, held_out)[0]
    assert prompts["pair"].value_counts().tolist() == [2] * 4


def test_a_batch_without_a_label_is_left_out():
    own = own_of({0: "a"})
    assert prompts_of_batches({0: "a"}, own[own["label"] == "safe"], None, CONFIG, seed=0) == {}


@pytest.fixture(scope="module")
def identified():
    counts = simulate(Population(num_layers=2), num_batches=4, planted=(Expert(1, 3),), shift=0.7)
    risk = identify(counts, by_prompt_tokens(permutations=0, resamples=0))
    num_experts = int(risk["expert"].max()) + 1
    selected = {batch: [Expert(1, 3), Expert(0, batch)] for batch in range(4)}
    return risk, masks_from_experts(selected, layers=tuple(sorted(set(risk["layer"]))), num_experts=num_experts)


def plans_of(identified, config=CONFIG, categories="abab"):
    risk, masks = identified
    names = dict(enumerate(categories))
    return plan_batches(asked(names, []), masks, risk, names, config, num_experts_per_tok=2, seed=0)


def test_every_batch_gets_its_selection_and_all_controls(identified):
    for plan in plans_of(identified):
        kinds = Counter(item.name for item in plan.sets)
        assert plan.sets[0].name == SELECTED
        assert (plan.sets[0].mask_LE == identified[1][plan.batch_idx]).all()
        assert kinds[MATCHED] == 5
        assert kinds[BUSIEST] == kinds[GLOBAL] == kinds[FORCED] == 1
        assert kinds[OTHER] == 2  # as there are batches of the other category
        assert len(plan.shares) == len(plan.sets)
        assert all(0 < share <= 1 for share in plan.shares)


def test_another_categorys_list_is_none_of_the_same_category(identified):
    masks = identified[1]
    for plan in plans_of(identified):
        lists = [item.mask_LE for item in plan.sets if item.name == OTHER]
        others = [masks[batch] for batch in range(4) if batch % 2 != plan.batch_idx % 2]
        assert all(any((mask == other).all() for other in others) for mask in lists)
    assert not [item for plan in plans_of(identified, categories="aaaa") for item in plan.sets if item.name == OTHER]


def test_the_one_list_is_the_same_for_batches_of_one_size_and_holds_the_largest_mean(identified):
    lists = [item.mask_LE for plan in plans_of(identified) for item in plan.sets if item.name == GLOBAL]
    assert all((mask == lists[0]).all() for mask in lists)
    assert lists[0].sum() == 2
    assert lists[0][identified[1].layers.index(1), 3]


@pytest.mark.parametrize("column", ["a_unsafe_n", "ci_low", "a_safe"])
def test_the_one_list_is_made_by_the_column_that_the_rule_ranks_by(identified, column):
    """By the mean over batches, whether or not the table of means has the column."""
    risk, masks = identified
    names = dict(enumerate("abab"))
    plans = plan_batches(asked(names, []), masks, risk, names, CONFIG, num_experts_per_tok=2, seed=0, column=column)
    means = risk.groupby(["layer", "expert"])[column].mean().sort_values(ascending=False, kind="stable")
    (found,) = {item.mask_LE.tobytes() for plan in plans for item in plan.sets if item.name == GLOBAL}
    expected = np.zeros(masks.masks_BLE.shape[1:], dtype=bool)
    for layer, expert in means.index[:2]:
        expected[masks.layers.index(layer), expert] = True
    assert found == expected.tobytes()


def test_settings_turn_sets_off(identified):
    config = AblateConfig(prompts=4, draws=1, others=0, forced=False, leave_one_out=0, curve=0)
    assert [item.name for item in plans_of(identified, config)[0].sets] == [SELECTED, MATCHED, BUSIEST, GLOBAL]


def test_draws_are_the_same_again_and_others_under_another_seed(identified):
    risk, masks = identified
    names = dict(enumerate("abab"))

    def matched(seed):
        plans = plan_batches(asked(names, []), masks, risk, names, CONFIG, num_experts_per_tok=2, seed=seed)
        return np.stack([item.mask_LE for plan in plans for item in plan.sets if item.name == MATCHED])

    assert (matched(0) == matched(0)).all()
    assert (matched(0) != matched(1)).any()


def test_nothing_to_plan_is_an_error_that_says_why(identified):
    risk, masks = identified
    with pytest.raises(NothingSelected, match="none of 0 batches can be checked"):
        plan_batches({}, masks, risk, {}, CONFIG, num_experts_per_tok=2, seed=0)
