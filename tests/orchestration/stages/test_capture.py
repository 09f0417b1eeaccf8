"""Captured once: what makes a stored capture stale, what does not, and what is said about it."""

import json
import logging
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from moe_ray.config.io import load_config
from moe_ray.orchestration.jobs import capture as capture_module
from moe_ray.orchestration.run import Run
from moe_ray.prompts.prompt_set import read_prompts
from moe_ray.prompts.quarantine import QUARANTINE, TRUNCATED, quarantine_frame
from moe_ray.routing.count_tables import counts_to_table
from moe_ray.run_directory import CAPTURE, RESPONSES, RunDirectory
from moe_ray.testing.simulated_counts import Population, simulate

pytestmark = [pytest.mark.needs_ray]

COUNTS = simulate(Population(num_layers=2, num_experts=4, num_experts_per_tok=2), num_batches=1)


@pytest.fixture
def workplace(tiny_model_path, tmp_path):
    """A folder with a model and prompts that may be changed."""
    shutil.copytree(tiny_model_path, tmp_path / "model")
    prompts = [{"prompt": f"prompt {row}", "label": ("safe", "unsafe")[row % 2], "target": "No."} for row in range(24)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    return tmp_path


@pytest.fixture
def captures(monkeypatch):
    """How many captures began."""
    begun = []

    def begin(run, model, config, *, seed, models):
        begun.append(config)
        for name in (QUARANTINE, TRUNCATED):
            run.sub(CAPTURE).write_table(name, quarantine_frame([]))
        return {"tokens": 1}

    monkeypatch.setattr(capture_module, "capture", begin)
    return begun


def run(workplace, *settings):
    config = load_config(
        overrides=[
            f"run_dir={workplace}/run",
            f"prompts.files={workplace}/prompts.jsonl",
            "prompts.safe_per_batch=2",
            "prompts.unsafe_per_batch=2",
            "capture.generate=false",
            "identify.roles=[prompt]",
            "identify.weighting=tokens",
            *settings,
        ]
    )
    model = replace(config.model, path=f"{workplace}/model")
    one = Run(config, model, read_prompts(config), RunDirectory.open(config.run_dir))
    one.prepare()
    one.capture()


def edit(name, change):
    def edited(workplace):
        file = workplace / name
        file.write_text(change(file.read_text()))

    return edited


CHANGES = {
    "a prompt": (edit("prompts.jsonl", lambda text: text.replace("prompt 3", "prompt three")), (), "examples"),
    "the tokenizer": (edit("model/tokenizer.json", lambda text: text + " "), (), "tokenizer"),
    "the chat template": (edit("model/chat_template.jinja", lambda text: text + " "), (), "chat template"),
    "the weights": (
        lambda workplace: (workplace / "model/model.safetensors").write_bytes(b"other"),
        (),
        "model weights",
    ),
    "which tokens count": (lambda workplace: None, ("capture.template_tokens=false",), "capture.template_tokens"),
    "routed weights": (lambda workplace: None, ("capture.weights=true",), "capture.weights"),
    "the longest example": (lambda workplace: None, ("capture.max_tokens=9",), "capture.max_tokens"),
    "another device": (
        lambda workplace: None,
        ("capture.gpus_per_actor=1",),
        "model.dtype, model.experts_implementation",
    ),
    "a score": (lambda workplace: None, ("capture.scores=[gate]",), "capture.scores"),
    "a rule that needs scores": (
        lambda workplace: None,
        ("identify.rule=comply_refuse",),
        "capture.scores, targets",
    ),
    "generation": (
        lambda workplace: None,
        ("capture.generate=true",),
        "capture.generate, capture.max_new_tokens, capture.temperature, seed",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_captures_again_and_is_named(name, workplace, captures, caplog):
    change, settings, said = CHANGES[name]
    run(workplace)
    change(workplace)
    with caplog.at_level(logging.INFO):
        run(workplace, *settings)
    assert len(captures) == 2
    assert f"capture: run again, because these inputs changed: {said}" in caplog.messages


def test_how_the_work_is_done_changes_nothing(workplace, captures, caplog):
    run(workplace)
    with caplog.at_level(logging.INFO):
        run(
            workplace,
            "capture.num_actors=3",
            "capture.max_actors=5",
            "capture.tokens_per_forward=100",
            "evaluate.num_actors=2",
            "model.dtype=float32",
            "model.experts_implementation=eager",
        )
    assert len(captures) == 1
    assert "capture: reused from an earlier run" in caplog.messages


def test_scores_that_no_rule_needs_any_more_stay_and_nothing_is_captured_again(workplace, captures, caplog):
    run(workplace, "identify.rule=gate_refuse")
    assert captures[0].scores == ("gate", "refusal")
    with caplog.at_level(logging.INFO):
        for settings in (["identify.rule=gate"], ["identify.rule=comply_refuse"], []):
            run(workplace, *settings)
    assert len(captures) == 1
    run(workplace, "identify.rule=attribution")
    assert captures[1].scores == ("attribution",)


def test_weights_are_summed_for_a_weighting_that_needs_them_and_kept_for_one_that_does_not(workplace, captures):
    run(workplace, "identify.weighting=activation")
    for settings in (["identify.weighting=tokens"], ["identify.rule=esft_gate"], ["capture.weights=true"]):
        run(workplace, *settings)
    assert [config.weights for config in captures] == [True]
    run(workplace, "identify.weighting=activation", "capture.template_tokens=false")
    assert captures[1].weights


def test_other_refusals_are_another_capture_where_refusals_were_captured(workplace, captures):
    run(workplace, "capture.scores=[gate]")
    edit("prompts.jsonl", lambda text: text.replace("No.", "Never."))(workplace)
    run(workplace, "capture.scores=[gate]")
    assert len(captures) == 1
    run(workplace, "capture.scores=[refusal]")
    edit("prompts.jsonl", lambda text: text.replace("Never.", "No."))(workplace)
    run(workplace, "capture.scores=[refusal]")
    assert len(captures) == 3


def test_an_unfinished_capture_is_resumed_unless_its_inputs_changed(workplace, captures, caplog):
    run(workplace)
    (workplace / "run/capture/manifest.json").unlink()
    (workplace / "run/capture/counts/part-0.json").touch()
    with caplog.at_level(logging.INFO):
        run(workplace)
    assert "capture: resuming an unfinished stage" in caplog.messages
    assert (workplace / "run/capture/counts/part-0.json").exists()
    (workplace / "run/capture/manifest.json").unlink()
    with caplog.at_level(logging.INFO):
        run(workplace, "capture.weights=true")
    assert "capture: run again, because these inputs changed: capture.weights" in caplog.messages
    assert not (workplace / "run/capture/counts/part-0.json").exists()


@pytest.fixture
def parts_of_examples(monkeypatch):
    """A capture that writes a part for each example that has none; returns which ones it counted, by run."""
    counted = []

    def captures(run, model, config, *, seed, models):
        keys = list(run.batches[["batch_idx", "in_batch_idx"]].itertuples(index=False, name=None))
        done = set(run.counts_folder.names())
        counted.append([key for key in keys if f"part-{key}.parquet" not in done])
        for key in counted[-1]:
            rows = COUNTS.take(np.array([0]))
            rows = replace(rows, batch_idx=np.array([key[0]]), in_batch_idx=np.array([key[1]]))
            run.counts_folder.write_table(f"part-{key}.parquet", counts_to_table(rows))
            if config.generate:
                run.sub(RESPONSES).write_table(f"part-{key}.parquet", pd.DataFrame({"response": [str(key)]}))
        for name in (QUARANTINE, TRUNCATED):
            run.sub(CAPTURE).write_table(name, quarantine_frame([]))
        return {"tokens": 1}

    monkeypatch.setattr(capture_module, "capture", captures)
    return counted


def lose(path):
    path.unlink()


def turn_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [lose, turn_a_bit])
@pytest.mark.parametrize("folder", ["counts", "responses"])
def test_only_a_part_that_is_lost_or_damaged_is_captured_again(workplace, parts_of_examples, caplog, damage, folder):
    settings = ("capture.generate=true",)
    run(workplace, *settings)
    run(workplace, *settings)
    assert len(parts_of_examples) == 1
    capture = workplace / "run/capture"
    made = json.loads((capture / "manifest.json").read_text())["notes"]["made"]
    path = sorted((capture / folder).iterdir())[3]
    damage(path)
    with caplog.at_level(logging.INFO):
        run(workplace, *settings)
    assert [f"part-{key}.parquet" for key in parts_of_examples[1]] == [path.name]
    assert f"capture: 1 of its parts are lost or not as they were written (such as {path.name})" in caplog.text
    assert "capture: resuming an unfinished stage" in caplog.messages
    assert json.loads((capture / "manifest.json").read_text())["notes"]["made"] == made
    run(workplace, *settings)
    assert len(parts_of_examples) == 2
