"""What is held out keeps pairs whole and labels balanced, and files that name a split have their way."""

import pytest
import simple_grouping
from prompt_examples import example, on_disk, random_examples

from moe_ray.prompts.splits import split_examples


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


@pytest.mark.slow
@pytest.mark.parametrize("whole_pairs", [True, False])
@pytest.mark.parametrize("validation_fraction", [0.0, 0.2])
def test_splits_are_those_of_looking_through_lists(whole_pairs, validation_fraction):
    for seed in range(40):
        examples = random_examples(seed, whole_pairs=whole_pairs)
        settings = {"test_fraction": 0.25, "validation_fraction": validation_fraction, "seed": seed % 3}
        expected = simple_grouping.split_examples(examples, **settings)
        for given in (examples, on_disk(examples)):
            got = split_examples(given, **settings)
            assert {split: list(some) for split, some in got.items()} == expected, seed
