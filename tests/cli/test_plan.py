"""A plan says what a run would do and take, and writes nothing."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from families import build
from word_tokenizer import make_tokenizer

from moe_ray.cli.main import main
from moe_ray.cli.plan import print_plan
from moe_ray.config.io import load_config
from moe_ray.resources.nodes import GB, Node

MACHINE = Node(cpus=8, memory=64 * GB)
H100 = replace(MACHINE, gpus=2, gpu_memory=80 * GB, gpu_name="H100")


@pytest.fixture
def place(tmp_path):
    """A checkpoint and prompts of two categories."""
    build("olmoe").save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    rows = [
        {"prompt": f"how are you {n}", "label": label, "category": category}
        for n in range(24)
        for label in ("safe", "unsafe")
        for category in ("fraud", "theft")
    ]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def settings_of(place, *more):
    return [f"model.path={place}/model", f"prompts.files=[{place}/prompts.jsonl]", "prompts.max_test_examples=5", *more]


def test_the_command_shows_prompts_memory_and_work_and_writes_nothing(place, capsys, monkeypatch):
    monkeypatch.chdir(place)
    assert main(["plan", *settings_of(place)]) == 0
    out = capsys.readouterr().out
    assert "fraud" in out
    assert "model, 0.0 GB in float32: 1 process x CPU" in out
    assert "of 16 experts has room" in out
    assert "steps" in out
    assert sorted(path.name for path in place.iterdir()) == ["model", "prompts.jsonl"]


def test_gpus_of_the_machine_are_planned_for(place, capsys):
    print_plan(load_config(None, settings_of(place)), machine=H100)
    assert "capture 2 x 1 H100, answers 2 x 1 H100, training 1 x 1 H100" in capsys.readouterr().out


def test_gpus_that_are_not_used_are_warned_of(place, capsys):
    idle = [f"{name}=0" for name in ("capture.gpus_per_actor", "evaluate.gpus_per_actor", "ablate.gpus_per_actor")]
    print_plan(load_config(None, settings_of(place, *idle, "finetune.gpus_per_worker=0")), machine=H100)
    assert "warning: 2 GPUs are there" in capsys.readouterr().out


def test_targets_that_comply_are_warned_of(place, capsys):
    lines = (place / "prompts.jsonl").read_text().splitlines()
    rows = [{**json.loads(line), "target": "Sure, here is how"} for line in lines]
    (place / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    print_plan(load_config(None, settings_of(place)), machine=MACHINE)
    assert "refuse nothing" in capsys.readouterr().out


def test_the_prompts_of_the_demo_with_a_real_model_are_warned_of(place, caplog):
    print_plan(load_config(None, [f"model.path={place}/model"]), machine=MACHINE)
    assert "runs on the prompts of the demo" in caplog.text


@pytest.mark.slow
def test_a_measured_plan_says_seconds(place, capsys):
    short = ("evaluate.max_new_tokens=2", "capture.max_new_tokens=4")
    print_plan(load_config(None, settings_of(place, *short)), machine=MACHINE, measures=True)
    assert "s to load the model" in capsys.readouterr().out


def test_what_a_run_would_refuse_is_refused(place, capsys):
    assert main(["plan", *settings_of(place, "model.path=./none")]) == 2
    assert "not a checkpoint folder" in capsys.readouterr().err
