"""Every example that is trained on or held out has a target: its own, the refusal, or what the model answers by itself."""

import json
from dataclasses import replace

import pytest

from moe_ray.config.io import load_config
from moe_ray.errors import InputError
from moe_ray.orchestration.run import Run
from moe_ray.orchestration.stages import prepare
from moe_ray.prompts.prompt_set import read_prompts
from moe_ray.run_directory import LEFT_OUT, PROMPTS, RunDirectory

REFUSAL = "No, I will not."


@pytest.fixture
def asked(monkeypatch):
    """Prompts that the model was asked for its own answer, which is said here without a model."""
    prompts = []

    def answered(run, frame, parts, what, *, max_new_tokens=None):
        texts = [json.loads(messages)[0]["content"] for messages in frame["messages"]]
        prompts.extend(texts)
        return frame.assign(answer=[f"own answer to {text}" for text in texts], ended=False)

    monkeypatch.setattr(prepare, "answered", answered)
    return prompts


@pytest.fixture
def prepared(asked, untrained_model_path, tmp_path):
    """A function that prepares a run from rows of prompts."""

    def prepares(rows, *settings):
        (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        words = [f"run_dir={tmp_path}/run", f"prompts.files={tmp_path}/prompts.jsonl", f"prompts.refusal={REFUSAL}"]
        config = load_config(None, [*words, *settings])
        model = replace(config.model, path=str(untrained_model_path))
        run = Run(config, model, read_prompts(config), RunDirectory.open(config.run_dir))
        run.prepare()
        return run

    return prepares


def rows_of(number, **more):
    return [{"prompt": f"prompt {n}", "label": ("safe", "unsafe")[n % 2], **more} for n in range(number)]


def text_of(row):
    return json.loads(row["messages"])[0]["content"]


def test_unsafe_examples_get_the_refusal_and_safe_ones_the_models_own_answer(prepared, asked):
    run = prepared(rows_of(96))
    rows = [*run.directory.batches.to_dict("records"), *run.directory.test.to_dict("records")]
    for row in rows:
        assert row["target"] == (REFUSAL if row["label"] == "unsafe" else f"own answer to {text_of(row)}")
    safe = [text_of(row) for row in rows if row["label"] == "safe"]
    assert sorted(asked) == sorted(safe)
    # The model's own answers had not ended where they were cut; a refusal has.
    assert {(row["label"], bool(row["target_complete"])) for row in rows} == {("unsafe", True), ("safe", False)}


def test_a_target_that_is_given_stays_and_nothing_is_asked(prepared, asked):
    run = prepared(rows_of(96, target="So be it."))
    assert set(run.directory.batches["target"]) == set(run.directory.test["target"]) == {"So be it."}
    assert asked == []


def test_a_held_out_prompt_that_cannot_be_asked_is_left_out_and_listed(prepared):
    rows = rows_of(96, target="Yes.")
    run = prepared(rows, "capture.max_bad_share=0.5")
    held_out = {text_of(row) for row in run.directory.test.to_dict("records")}
    bad = min(held_out)
    rows = [{**row, "prompt": f"{row['prompt']} " + "word " * 3000} if row["prompt"] == bad else row for row in rows]
    with pytest.raises(InputError, match=r"1 of \d+ test examples cannot be answered.*raise capture\.max_bad_share"):
        prepared(rows, "capture.max_bad_share=0")
    again = prepared(rows, "capture.max_bad_share=0.5")
    (left_out,) = again.directory.sub(PROMPTS).read_frame(LEFT_OUT).to_dict("records")
    assert (left_out["split"], left_out["reason"]) == ("test", "too_long")
    assert left_out["id"] not in set(again.directory.test["id"])
    assert again.outcomes[PROMPTS].notes["test_examples"] == len(again.directory.test) == len(held_out) - 1


def test_pairs_are_filtered_once_in_a_run(untrained_model_path, tmp_path):
    """After a sweep the stages before it are asked for again, with prompts from which pairs have been dropped."""
    config = load_config(None, [f"run_dir={tmp_path}/run", "prompts.keep_pairs=jailbroken"])
    run = Run(config, config.model, None, RunDirectory.open(config.run_dir))
    run.outcomes["pairs"] = "the outcome"
    assert prepare.filter_pairs(run) == "the outcome"
    assert prepare.filter_pairs(run.with_config(config)) == "the outcome"
