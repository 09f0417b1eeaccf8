"""The stage: every task on both models once, kept under what it depends on; in this process, with a harness of two lines."""

from __future__ import annotations

import causal_model
import pytest
import torch
from in_process_pool import InProcessPool

from moe_ray.config.io import load_config
from moe_ray.config.model import ModelConfig
from moe_ray.experts import Expert, masks_from_experts
from moe_ray.finetuning.adapter import expert_weights, hash_weights, save_adapter
from moe_ray.finetuning.trainable_experts import trainable_experts
from moe_ray.harness import tasks
from moe_ray.harness.scores import score_table
from moe_ray.orchestration.jobs import harness as job
from moe_ray.orchestration.run import Run
from moe_ray.run_directory import FINETUNE, HARNESS, RunDirectory
from moe_ray.storage.stage import MADE, Outcome

pytestmark = pytest.mark.slow


@pytest.fixture
def run_of(tmp_path, monkeypatch):
    """A function that gives a run with learned experts, and the tasks that were scored, with the model's first weight."""
    model, scored = causal_model.build("causal"), []
    model.save_pretrained(tmp_path / "model")
    causal_model.tokenizer().save_pretrained(tmp_path / "model")
    directory = RunDirectory.open(str(tmp_path / "run"))
    masks = masks_from_experts({0: [Expert(0, 0)]}, layers=(0,), num_experts=causal_model.NUM_EXPERTS)
    with trainable_experts(model, masks.union) as trainable:
        base_hash = hash_weights(expert_weights(model, [Expert(0, 0)]))
        with torch.no_grad():
            for parameter in trainable.all_parameters():
                parameter.zero_()
        save_adapter(directory.sub(FINETUNE).path, trainable, base="", base_hash=base_hash, mask_hash=masks.digest())

    def scores(model, tokenizer, task, config):
        is_repaired = not model.model.layers[0].mlp.experts.gate_up_proj[0].any()
        scored.append((task.title, bool(is_repaired)))
        rows = [{"task": task.title, "metric": "acc", "sample": n, "value": float(is_repaired)} for n in range(4)]
        return score_table(rows), [{"sample": "0"}]

    monkeypatch.setattr(job, "lm_eval_scores", scores)
    monkeypatch.setattr(tasks, "require", lambda module, what: None)
    monkeypatch.setattr(tasks, "version_of", lambda module: "1.0")

    def runs(*settings, experts="learned"):
        config = load_config(None, [f"run_dir={tmp_path}/run", *settings])
        run = Run(config, ModelConfig(path=str(tmp_path / "model")), None, RunDirectory(directory.folder))
        run.models = InProcessPool(model, causal_model.tokenizer())
        notes = {MADE: {"experts": experts}}
        outcome = Outcome(folder=directory.sub(FINETUNE), notes=notes, seconds=0.0, is_reused=True)
        run.outcomes = {FINETUNE: outcome}
        return run

    return runs, scored


def test_each_task_is_scored_on_the_base_model_and_then_on_the_repaired_one(run_of):
    runs, scored = run_of
    run = runs("harness.lm_eval=[hellaswag,arc_easy]")
    notes = run.harness().notes
    assert scored == [(name, when) for when in (False, True) for name in ("hellaswag", "arc_easy")]
    assert [row["task"] for row in notes["figures"]] == ["hellaswag", "arc_easy"]
    assert notes["figures"][0]["change"]["value"] == 1.0
    (samples,) = run.directory.sub(HARNESS).fs.glob(
        f"{run.directory.sub(HARNESS).path}/*hellaswag*/after/samples.jsonl"
    )
    assert samples


def test_another_task_runs_that_one_only_and_another_repair_leaves_the_base_models_scores(run_of):
    runs, scored = run_of
    runs("harness.lm_eval=[hellaswag]").harness()
    del scored[:]
    runs("harness.lm_eval=[hellaswag]", "harness.batch_size=1").harness()
    assert scored == []
    runs("harness.lm_eval=[hellaswag,arc_easy]").harness()
    assert scored == [("arc_easy", False), ("arc_easy", True)]
    del scored[:]
    runs("harness.lm_eval=[hellaswag]", experts="other").harness()
    assert scored == [("hellaswag", True)]
    del scored[:]
    runs("harness.lm_eval=[hellaswag]", "harness.limit=2").harness()
    assert scored == [("hellaswag", False), ("hellaswag", True)]


def test_a_harness_that_is_to_run_needs_a_task():
    from moe_ray.errors import InputError

    with pytest.raises(InputError, match=r"harness\.lm_eval: got \(\), expected a task, such as \[hellaswag\]"):
        load_config(None, ["harness.run=true"])
