import random
import time

import pytest
import simple_grouping
from hypothesis import given, settings
from hypothesis import strategies as st
from prompt_examples import example, many, on_disk, random_examples

from moe_ray.errors import InputError
from moe_ray.prompts.batches import assemble_batches


@settings(max_examples=40)
@given(st.integers(2, 40), st.integers(2, 40), st.integers(1, 4), st.integers(1, 4), st.integers(0, 3))
def test_every_batch_has_the_same_make_up_and_no_example_is_lost_or_doubled(safe, unsafe, per_safe, per_unsafe, seed):
    examples = many(safe, unsafe, "a") + many(safe, unsafe, "b", start=100)
    if safe < per_safe or unsafe < per_unsafe:
        return
    made = assemble_batches(examples, safe_per_batch=per_safe, unsafe_per_batch=per_unsafe, seed=seed)
    for batch in made.batches:
        labels = [item.label for item in batch.examples]
        assert (labels.count("safe"), labels.count("unsafe")) == (per_safe, per_unsafe)
        assert len({item.category for item in batch.examples}) == 1
    used = [item.id for batch in made.batches for item in batch.examples] + [item.id for item in made.left_over]
    assert sorted(used) == sorted(item.id for item in examples)


def test_the_same_seed_gives_the_same_batches():
    examples = many(32, 32)
    assert assemble_batches(examples, seed=3) == assemble_batches(examples, seed=3)
    assert assemble_batches(examples, seed=3) != assemble_batches(examples, seed=4)


def test_pairs_stay_in_one_batch():
    examples = [example(n, label, pair=str(n)) for n in range(24) for label in ("safe", "unsafe")]
    made = assemble_batches(examples)
    assert len(made.batches) == 3
    for batch in made.batches:
        safe = {item.pair for item in batch.examples if item.label == "safe"}
        assert safe == {item.pair for item in batch.examples if item.label == "unsafe"}


def test_safe_examples_without_a_category_are_shared_among_all():
    examples = many(16, 0) + many(0, 8, "fraud", 50) + many(0, 8, "hacking", 80)
    made = assemble_batches(examples)
    assert [batch.category for batch in made.batches] == ["fraud", "hacking"]
    assert not made.left_over


def test_categories_can_be_ignored():
    examples = many(8, 4, "fraud") + many(0, 4, "hacking", 50)
    with pytest.raises(InputError, match="by_category=false"):
        assemble_batches(examples)
    assert len(assemble_batches(examples, by_category=False).batches) == 1


@pytest.mark.parametrize("examples", [many(20, 0), many(0, 20)])
def test_one_label_only_is_refused(examples):
    with pytest.raises(InputError, match="expected both labels"):
        assemble_batches(examples)


def test_an_unsafe_example_without_a_category_fills_no_batch_of_a_category():
    made = assemble_batches(many(8, 7, "fraud") + many(8, 8, start=50))
    assert [batch.category for batch in made.batches] == ["mixed"]
    assert all(item.category == "" for item in made.batches[0].examples)


def test_a_batch_prints_as_one_line():
    made = assemble_batches(many(9, 8, "fraud"))
    assert repr(made.batches[0]) == "Batch(0, fraud, 8 safe + 8 unsafe)"
    assert repr(made) == "Assembly(1 batches, 1 examples left over)"


def plain(made):
    return [(batch.batch_idx, batch.category, batch.examples) for batch in made.batches], list(made.left_over)


@pytest.mark.slow
@pytest.mark.parametrize("whole_pairs", [True, False])
@pytest.mark.parametrize("by_category", [True, False])
def test_batches_are_those_of_looking_through_lists(whole_pairs, by_category):
    compared = 0
    for seed in range(60):
        examples = random_examples(seed, whole_pairs=whole_pairs)
        draw = random.Random(seed)
        settings = {
            "safe_per_batch": draw.randint(1, 5),
            "unsafe_per_batch": draw.randint(1, 5),
            "by_category": by_category,
            "max_batches": draw.choice([0, 0, 1, 3]),
            "seed": seed % 3,
        }
        batches, left_over = simple_grouping.assemble(examples, **settings)
        if not batches:
            with pytest.raises(InputError):
                assemble_batches(examples, **settings)
            continue
        compared += 1
        assert plain(assemble_batches(examples, **settings)) == (batches, left_over), seed
        stored = assemble_batches(on_disk(examples), **settings)
        assert plain(stored) == (batches, left_over), seed
        assert stored.batches[-1].examples == batches[-1][2]
        assert len(stored.batches[1:]) == len(batches) - 1
    assert compared > 30


@pytest.mark.slow
def test_the_time_a_batch_takes_does_not_grow_with_examples_that_find_none():
    """Looking through lists passes, for each batch, over all the safe examples and pairs that did not fit before."""
    examples = many(40_000, 4_000) + [
        example(n, label, pair=str(n)) for n in range(10_000) for label in ("unsafe",) * 2
    ]
    started = time.process_time()
    made = assemble_batches(examples, safe_per_batch=1, unsafe_per_batch=1)
    assert len(made.batches) == 4_000
    assert time.process_time() - started < 5


@pytest.mark.parametrize("sizes", [(0, 0), (0, 2), (2, 0)])
def test_a_batch_without_a_label_is_refused(sizes):
    with pytest.raises(InputError, match="expected at least 1 of each label"):
        assemble_batches(many(4, 4), safe_per_batch=sizes[0], unsafe_per_batch=sizes[1])


def test_more_batches_than_there_are_may_be_asked_for():
    assert assemble_batches(many(32, 32), max_batches=7) == assemble_batches(many(32, 32))
