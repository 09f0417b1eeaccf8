"""A run's repaired model as a checkpoint that needs no moe-ray."""

from __future__ import annotations

import pytest
import torch
from families import batch_masks, build, token_ids
from text_batches import BATCHES, EXPERTS
from transformers import AutoModelForCausalLM, AutoTokenizer
from word_tokenizer import make_tokenizer

from moe_ray.cli.main import main
from moe_ray.config import Config
from moe_ray.config.finetune import FinetuneConfig
from moe_ray.finetuning.fine_tune import fine_tune
from moe_ray.run_directory import RunDirectory

IDS = token_ids(2, 9)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def run(request, tmp_path):
    """A base checkpoint, a run directory with its learned experts, and the tuned model."""
    base, experts = tmp_path / "base", tmp_path / "run" / "finetune"
    model, tokenizer = build("olmoe", dtype=request.param), make_tokenizer()
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    masks = batch_masks(model, EXPERTS)
    config = FinetuneConfig(epochs=1, learning_rate=1e-2)
    fine_tune(model, tokenizer, BATCHES, masks, config=config, adapter=experts, base=str(base))
    RunDirectory.open(str(tmp_path / "run")).write_config(Config())
    return model


@pytest.mark.slow
@pytest.mark.parametrize("base", [[], ["--base", "base"]])
def test_the_merged_checkpoint_is_the_tuned_model(run, base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["merge", "run", "repaired", *base]) == 0
    repaired = AutoModelForCausalLM.from_pretrained("repaired", experts_implementation="eager").eval()
    assert repaired.dtype == run.dtype
    # The tuned model was built with its rotary buffers in its type; a checkpoint that is loaded has them in float32.
    repaired.model.rotary_emb = run.model.rotary_emb
    with torch.no_grad():
        assert torch.equal(repaired(IDS).logits, run(IDS).logits)
    assert AutoTokenizer.from_pretrained("repaired")("how are")["input_ids"] == make_tokenizer()("how are")["input_ids"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "repaired", "run"]


def test_another_base_is_refused_and_nothing_is_written(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    other = build("olmoe", dtype=run.dtype)
    with torch.no_grad():
        other.model.layers[0].mlp.experts.down_proj += 1.0
    other.save_pretrained("other")
    make_tokenizer().save_pretrained("other")
    assert main(["merge", "run", "repaired", "--base", "other"]) == 2
    assert "not those it was trained from" in capsys.readouterr().err
    assert not (tmp_path / "repaired").exists()


def test_a_folder_that_holds_files_is_left_alone(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["merge", "run", "base"]) == 2
    assert "already holds files" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("nowhere", "not a run directory"),
        ("base", "not a run directory"),
        ("untrained", "holds no finetune/adapter.json; give the directory of a run that finished the stage 'finetune'"),
    ],
)
def test_a_folder_without_learned_experts_is_refused(run, name, reason, tmp_path, monkeypatch, capsys):
    RunDirectory.open(str(tmp_path / "untrained")).write_config(Config())
    monkeypatch.chdir(tmp_path)
    assert main(["merge", name, "repaired"]) == 2
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "repaired").exists()
    assert not (tmp_path / name / "finetune").exists()
