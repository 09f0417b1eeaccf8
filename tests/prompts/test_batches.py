import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_ray.errors import InputError
from moe_ray.prompts.batches import assemble_batches
from moe_ray.prompts.example_tables import batches_to_frame, frame_to_batches
from moe_ray.prompts.examples import Example
from moe_ray.prompts.splits import split_examples


def example(number, label, category="", pair=None, split=None):
    messages = ({"role": "user", "content": f"prompt {number}"},)
    return Example(id=f"{label}-{number}", messages=messages, label=label, category=category, pair=pair, split=split)


def many(num_safe, num_unsafe, category="", start=0):
    safe = [example(start + n, "safe", category) for n in range(num_safe)]
    return safe + [example(start + n, "unsafe", category) for n in range(num_unsafe)]


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


def test_batches_survive_being_stored():
    batches = assemble_batches(many(16, 16, "fraud")).batches
    frame = batches_to_frame(batches)
    assert frame_to_batches(frame.sample(frac=1, random_state=0)) == list(batches)


def test_a_dropped_batch_does_not_rename_the_others():
    frame = batches_to_frame(assemble_batches(many(24, 24)).batches)
    kept = frame_to_batches(frame[frame["batch_idx"] != 1])
    assert [batch.batch_idx for batch in kept] == [0, 2]


def test_the_files_own_split_is_kept_and_the_rest_is_held_out_with_pairs_whole():
    given_split = [example(n, "safe", split="validation") for n in range(3)]
    pairs = [example(100 + n, label, pair=str(n)) for n in range(20) for label in ("safe", "unsafe")]
    splits = split_examples(given_split + pairs, test_fraction=0.25, seed=0)
    assert [item.id for item in splits["validation"]] == [item.id for item in given_split]
    assert len(splits["test"]) == 10
    assert {item.pair for item in splits["test"]}.isdisjoint({item.pair for item in splits["train"]})


def test_validation_is_held_out_of_training_only_where_no_file_names_it():
    given_test = [example(200 + n, label, split="test") for n in range(4) for label in ("safe", "unsafe")]
    given_train = [example(n, label, split="train") for n in range(20) for label in ("safe", "unsafe")]
    pairs = [example(100 + n, label, pair=str(n)) for n in range(20) for label in ("safe", "unsafe")]
    splits = split_examples(given_test + given_train + pairs, test_fraction=0.25, validation_fraction=0.2, seed=0)
    assert {item.id for item in given_test} <= {item.id for item in splits["test"]}
    held_out = splits["validation"]
    assert len(held_out) == 2 * 4 + 2 * 3
    assert all(item.split == "validation" for item in held_out)
    assert {item.pair for item in held_out if item.pair}.isdisjoint({item.pair for item in splits["train"]})
    assert [item.label for item in held_out].count("safe") == [item.label for item in held_out].count("unsafe")
    ids = [item.id for part in splits.values() for item in part]
    assert sorted(ids) == sorted(item.id for item in given_test + given_train + pairs)
    named = [*given_train, example(500, "safe", split="validation")]
    assert len(split_examples(named, test_fraction=0.25, validation_fraction=0.2, seed=0)["validation"]) == 1


def test_without_a_validation_fraction_no_training_example_is_taken():
    given_train = [example(n, label, split="train") for n in range(20) for label in ("safe", "unsafe")]
    splits = split_examples(given_train, test_fraction=0.25, seed=0)
    assert [item.id for item in splits["train"]] == [item.id for item in given_train]
