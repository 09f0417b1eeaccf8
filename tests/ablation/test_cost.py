"""What the check would cost: it grows with batches, prompts and sets, and is left out where it is dear."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moe_ray.ablation.cost import LARGEST_SHARE, RunSize, num_sets, tokens_of_check, tokens_of_run, what_is_affordable
from moe_ray.config.ablate import AblateConfig

SMALL = RunSize(
    batches=12, experts=10, examples=192, test_examples=96, tokens_per_example=30, epochs=4, answer_tokens=32
)
CONFIG = AblateConfig()


def test_every_set_is_counted_with_the_model_as_it_is():
    # as it is, selected, 5 draws, busiest, 3 others, global, 2 forced, 8 x 2 single experts, 5 coalitions
    assert num_sets(CONFIG, experts=10) == 1 + 1 + 5 + 1 + 3 + 1 + 2 + 16 + 5
    assert num_sets(CONFIG, experts=2) == num_sets(CONFIG, experts=10) - 12


def test_the_tokens_of_a_check_as_by_hand():
    config = replace(CONFIG, max_batches=2, prompts=4, draws=1, others=0, forced=False, leave_one_out=0, curve=0)
    # 2 batches of 8 prompts of 30 + 32 tokens: as it is, 4 sets, and two answers
    assert tokens_of_check(SMALL, config) == 2 * 8 * 62 * (5 + 2)


def test_the_tokens_of_a_run_as_by_hand():
    assert tokens_of_run(SMALL) == 192 * 30 + 3 * 4 * 192 * 62 + 2 * 96 * 2 * 62


def test_a_small_run_leaves_it_out_and_says_what_to_do():
    estimate = what_is_affordable(SMALL, CONFIG)
    assert estimate.config is None
    assert estimate.share > LARGEST_SHARE
    assert "left out" in estimate.in_words()
    assert "ablate.run=true" in estimate.in_words()


def test_a_large_run_does_it_all_and_one_between_does_without_single_experts():
    size, seen = SMALL, []
    for factor in (1, 12, 100):
        estimate = what_is_affordable(replace(size, batches=12 * factor, examples=192 * factor), CONFIG)
        seen.append(None if estimate.config is None else (estimate.config.leave_one_out, estimate.config.curve))
    assert seen == [None, (0, 0), (CONFIG.leave_one_out, CONFIG.curve)]


@pytest.mark.parametrize("name", ["prompts", "draws", "others", "max_new_tokens", "leave_one_out", "curve"])
def test_more_of_anything_costs_more(name):
    more = replace(CONFIG, **{name: getattr(CONFIG, name) + 1})
    assert tokens_of_check(SMALL, more) > tokens_of_check(SMALL, CONFIG)
