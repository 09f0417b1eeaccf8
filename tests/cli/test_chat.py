import io
import json
import sys

import pytest
from run_directory import write_identified

from moe_ray.cli.chat import _lines
from moe_ray.cli.main import main
from moe_ray.storage.folder import Folder


@pytest.mark.slow
def test_a_steered_model_answers_otherwise_than_it_does_by_itself(tiny_model_path, tmp_path, capsys):
    truth = json.loads((tiny_model_path / "truth.json").read_text())
    file = tmp_path / "steering.json"
    file.write_text(json.dumps({"experts": truth["planted"]["fraud"], "manner": "around"}))
    rows = [json.loads(line) for line in (tiny_model_path / "prompts.jsonl").read_text().splitlines()]
    prompt = next(row["prompt"] for row in rows if row["label"] == "unsafe" and row["category"] == "fraud")
    assert main(["steer", str(tiny_model_path), str(file), "--max-new-tokens", "12", "--prompt", prompt]) == 0
    shown = capsys.readouterr().out
    assert prompt[:40] in shown
    assert "sorry" in shown.lower()  # without the planted experts it refuses
    assert "as it is" in shown
    assert "around" in shown


def test_lines_are_read_until_the_input_ends(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("How?\n\n  Why?  \n"))
    assert list(_lines()) == ["How?", "Why?"]


def test_a_run_without_learned_experts_is_named(tmp_path, capsys):
    write_identified(Folder.open(str(tmp_path / "run")))
    assert main(["chat", str(tmp_path / "run"), "--prompt", "How?"]) == 2
    assert "moe-ray finetune" in capsys.readouterr().err
