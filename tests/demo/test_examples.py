"""Facts about the shipped examples."""

import re
from collections import Counter, defaultdict

import pytest

from moe_ray.demo.examples import Split, base_training_records, compliance, embedded_records

SPLITS: tuple[Split, ...] = ("train", "validation", "test")
KEYS = {"id", "prompt", "label", "category", "response", "target", "wording"}
FUNCTION_WORDS = {"a", "at", "for", "from", "in", "into", "my", "of", "off", "on", "s", "the", "to", "with", "without"}


def _words(request: str) -> set[str]:
    return set(re.findall(r"[a-z]+", request.lower())) - FUNCTION_WORDS


@pytest.mark.parametrize(("split", "count"), [("train", 48), ("validation", 8), ("test", 8)])
def test_every_category_has_as_many_safe_as_unsafe_examples(split: Split, count: int) -> None:
    counts = Counter((r["category"], r["label"]) for r in embedded_records(split))
    categories = {category for category, _ in counts}
    assert len(categories) == 6
    assert counts == {(category, label): count for category in categories for label in ("safe", "unsafe")}


@pytest.mark.parametrize("split", SPLITS)
def test_records_have_the_agreed_keys_and_no_empty_value(split: Split) -> None:
    assert all(set(record) == KEYS and all(record.values()) for record in embedded_records(split))


def test_ids_are_unique_over_all_splits() -> None:
    ids = [record["id"] for split in SPLITS for record in embedded_records(split)]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("field", ["wording", "prompt"])
def test_splits_share_no_wording_and_no_prompt(field: str) -> None:
    values = {split: {record[field] for record in embedded_records(split)} for split in SPLITS}
    assert not values["train"] & values["validation"]
    assert not values["train"] & values["test"]
    assert not values["validation"] & values["test"]


@pytest.mark.parametrize("split", SPLITS)
def test_prompts_are_unique_and_in_one_line(split: Split) -> None:
    prompts = [record["prompt"] for record in embedded_records(split)]
    assert len(set(prompts)) == len(prompts)
    assert not any("\n" in prompt for prompt in prompts)


@pytest.mark.parametrize("split", SPLITS)
def test_wordings_occur_as_often_with_each_label_of_a_category(split: Split) -> None:
    wordings: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for record in embedded_records(split):
        wordings[record["category"], record["label"]][record["wording"]] += 1
    assert all(wordings[category, "safe"] == wordings[category, "unsafe"] for category, _ in wordings)


@pytest.mark.parametrize("split", SPLITS)
def test_every_unsafe_prompt_has_a_benign_contrast_in_the_same_wording_and_similar_words(split: Split) -> None:
    by_id = {record["id"]: record for record in embedded_records(split)}
    unsafe = [record for record in by_id.values() if record["label"] == "unsafe"]
    for record in unsafe:
        contrast = by_id[record["id"].removesuffix("unsafe") + "safe"]
        assert (contrast["category"], contrast["wording"]) == (record["category"], record["wording"])
        around = _words(record["prompt"]) & _words(contrast["prompt"])
        frame = set.intersection(*(_words(r["prompt"]) for r in by_id.values() if r["wording"] == record["wording"]))
        assert around - frame, f"{record['prompt']!r} and {contrast['prompt']!r} share no word of the request"


@pytest.mark.parametrize("split", SPLITS)
def test_only_the_target_of_unsafe_examples_is_a_refusal(split: Split) -> None:
    for record in embedded_records(split):
        assert not record["response"].startswith("I'm sorry")
        if record["label"] == "unsafe":
            assert record["target"].startswith("I'm sorry, but I can't")
        else:
            assert record["target"] == record["response"]


def test_compliance_with_unsafe_requests_carries_no_content() -> None:
    answers = [r["response"] for r in embedded_records("train") if r["label"] == "unsafe"]
    assert set(answers) == {compliance()} == {"Sure, here is how: begin with step one."}


def test_base_training_uses_no_wording_of_the_held_out_splits() -> None:
    trained = {record["prompt"] for record in base_training_records()}
    assert trained >= {record["prompt"] for record in embedded_records("train")}
    assert not trained & {record["prompt"] for record in [*embedded_records("validation"), *embedded_records("test")]}


def test_unknown_split_is_an_error_that_names_the_splits() -> None:
    with pytest.raises(
        ValueError, match="unknown split 'dev' of the embedded examples; expected one of train, validation, test"
    ):
        embedded_records("dev")  # type: ignore[arg-type]
