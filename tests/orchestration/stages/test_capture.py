"""Captured once: what makes a stored capture stale, what does not, and what is said about it."""

import json
import logging
import shutil
from dataclasses import replace

import pytest

from moe_ray.config.io import load_config
from moe_ray.orchestration.jobs import capture as capture_module
from moe_ray.orchestration.run import Run
from moe_ray.prompts.prompt_set import read_prompts
from moe_ray.prompts.quarantine import QUARANTINE, TRUNCATED, quarantine_frame
from moe_ray.run_directory import CAPTURE, RunDirectory

pytestmark = [pytest.mark.needs_ray]


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
