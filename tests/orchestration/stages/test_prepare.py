"""Every example that is trained on or held out has a target: its own, the refusal, or what the model answers by itself."""

import json
from dataclasses import replace

import pandas as pd
import pytest

from moe_ray.config.io import load_config
from moe_ray.errors import InputError
from moe_ray.evaluation.evaluate import assign_reference_batches
from moe_ray.orchestration.run import Run
from moe_ray.orchestration.stages import prepare
from moe_ray.prompts import shuffle
from moe_ray.prompts.example_tables import BATCHES, frame_to_batches
from moe_ray.prompts.prompt_set import read_prompts
from moe_ray.run_directory import LEFT_OUT, PROMPTS, TEST, VALIDATION, RunDirectory
from moe_ray.storage.stage import MADE

REFUSAL = "No, I will not."


@pytest.fixture
def asked(monkeypatch):
    """Prompts that the model was asked for its own answer, which is said here without a model."""
    prompts = []

    def answered(run, frame, parts, what, *, max_new_tokens=None, after_thought=False):
        assert after_thought  # a target stands after a closed thought
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


@pytest.mark.slow
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


def test_another_topic_is_another_input_of_the_controls_and_of_nothing_else(prepared):
    made = []
    for topic in ("weather", "food"):
        run = prepared(rows_of(96, target="Yes.", topic=topic, template=3))
        assert set(run.directory.batches["topic"]) == set(run.directory.test["topic"]) == {topic}
        assert set(run.directory.batches["template"]) == {"3"}
        made.append(run.outcomes[PROMPTS].notes[MADE])
    assert [name for name in made[0] if made[0][name] != made[1][name]] == ["fields"]


@pytest.mark.slow
@pytest.mark.parametrize("rows", [7, 16, 50])
def test_what_is_prepared_does_not_depend_on_how_much_is_in_memory_at_once(prepared, asked, monkeypatch, rows):
    """Long prompts, pairs and categories; the small pieces ask for own answers piece by piece."""
    examples = [
        {"prompt": f"prompt {n} {'x' * (n % 13)}", "label": ("safe", "unsafe")[n % 2], "category": "abc"[n % 3]}
        | ({"target": "Yes."} if n % 5 else {})
        for n in range(120)
    ]
    examples += [{"goal": f"goal {n}", "all_prompt": f"attack {n}", "category": "a"} for n in range(24)]
    settings = ("prompts.safe_per_batch=4", "prompts.unsafe_per_batch=4", "prompts.validation_fraction=0.2")
    whole = prepared(examples, *settings)
    first = sorted(asked)
    frames = {name: whole.directory.sub(PROMPTS).read_frame(name) for name in (BATCHES, TEST, VALIDATION)}
    whole.directory.folder.delete()
    asked.clear()
    monkeypatch.setattr(shuffle, "ROWS_PER_PIECE", rows)
    monkeypatch.setattr(prepare, "_ROWS_TOGETHER", 2 * rows)
    again = prepared(examples, *settings)
    assert sorted(asked) == first
    assert again.outcomes[PROMPTS].notes == whole.outcomes[PROMPTS].notes | {
        "seconds": again.outcomes[PROMPTS].notes["seconds"]
    }
    for name, frame in frames.items():
        assert again.directory.sub(PROMPTS).read_frame(name).equals(frame)
    inputs = [run.directory.manifest(PROMPTS)["inputs"] for run in (again, prepared(examples, *settings))]
    assert inputs[0] == inputs[1]
    assert list(again.directory.batches.columns[:3]) == ["batch_idx", "in_batch_idx", "id"]
    # The batches are those of the plain way, and held-out examples have the reference batches of the whole table.
    batches = frame_to_batches(again.directory.batches)
    assert [replace(batch, examples=_without_targets(batch.examples)) for batch in batches] == [
        replace(batch, examples=_without_targets(batch.examples)) for batch in again.prompts.batches
    ]
    for name in (TEST, VALIDATION):
        stored = frames[name]
        assert set(stored["split"]) == {name.partition(".")[0]}
    held_out = pd.concat([frames[TEST], frames[VALIDATION]], ignore_index=True)
    expected = assign_reference_batches(held_out, frames[BATCHES])
    assert held_out["batch_idx"].tolist() == expected.tolist()


def _without_targets(examples):
    return tuple(replace(example, target=None, target_complete=True) for example in examples)
