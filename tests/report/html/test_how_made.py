import sys

from moe_ray.report.html.how_made import how_it_was_made
from moe_ray.storage.fingerprint import environment


def test_model_prompts_judge_and_seed_are_named(run):
    made = how_it_was_made(run)
    assert made["seed"] == str(run.config.seed)
    assert run.config.model.path in made["model"]
    assert made["prompts"] == "embedded"


def test_a_manifest_says_command_machine_and_date_and_no_password(monkeypatch):
    monkeypatch.setattr(
        sys, "argv", ["/home/me/bin/moe-ray", "full", "runs/a b", "prompts.files=https://me:secret@host/x.csv"]
    )
    found = environment()
    assert found["command"] == "moe-ray full 'runs/a b' 'prompts.files=https://…@host/x.csv'"
    assert "processors" in found["machine"]
    assert found["finished"].endswith("+00:00")
