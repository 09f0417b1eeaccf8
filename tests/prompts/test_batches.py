import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prompt_examples import example, many

from moe_ray.errors import InputError
from moe_ray.prompts.batches import assemble_batches


@settings(max_examples=40, deadline=None)
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
