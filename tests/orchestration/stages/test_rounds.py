"""Rounds of a whole run: what each did, which is kept, and what a kill leaves."""

import json
import shutil
from itertools import combinations, pairwise

import pandas as pd
import pytest
import torch
from study_runs import modified, settings
from workflow import run_workflow

from moe_ray.config.io import load_config, with_settings
from moe_ray.config.model import ModelConfig
from moe_ray.finetuning.adapter import adapter_applied, expert_weights, load_adapter
from moe_ray.finetuning.history import read_history
from moe_ray.identification.mask_files import read_masks
from moe_ray.models.loading import load_model
from moe_ray.orchestration.run import Run
from moe_ray.orchestration.stages.evaluate import folder_of_masks
from moe_ray.run_directory import FINETUNE, IDENTIFY, RunDirectory
from moe_ray.storage.folder import Folder
from moe_ray.storage.stage import read_outcome

pytestmark = [pytest.mark.needs_ray, pytest.mark.slow, pytest.mark.filterwarnings("default")]


def test_rounds_report_validation_and_keep_the_best(finished, summary):
    experts = json.loads((finished / "finetune" / "manifest.json").read_text())["notes"]
    reports = experts["rounds"]
    assert 1 <= len(reports) <= 2
    assert experts["kept_round"] == min(reports, key=lambda report: (report["cost"], report["round"]))["round"]
    assert experts["stopped_because"]
    answers = pd.read_parquet(finished / "finetune" / "round_1" / "validation" / "answers.parquet")
    test = pd.read_parquet(finished / "prompts" / "test.parquet")
    assert not set(answers["id"]) & set(test["id"])


def test_the_experts_of_all_rounds_are_one_adapter_of_the_original_base(finished, tiny_model_path, summary):
    experts = json.loads((finished / "finetune" / "manifest.json").read_text())["notes"]
    about, tensors = load_adapter(finished / "finetune")
    kept = [finished / "finetune" / f"round_{number}" for number in range(1, experts["kept_round"] + 1)]
    unions = [set(read_masks(Folder.open(str(folder))).union_experts) for folder in kept]
    assert set(tensors) == set().union(*unions)
    model = load_model(ModelConfig(path=str(tiny_model_path)), device="cpu")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with adapter_applied(model, finished / "finetune"):
        changed = sum(not torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        assert changed > 0
    assert summary["frozen_parameters_changed"] == 0
    assert summary["trainable_parameters"] == sum(t.numel() for weights in tensors.values() for t in weights.values())
    assert about["base"] == str(tiny_model_path)


def test_the_history_of_the_rounds_is_one(finished):
    experts = json.loads((finished / "finetune" / "manifest.json").read_text())["notes"]
    steps = read_history(Folder.open(str(finished)).sub("finetune"))
    assert [step["step"] for step in steps] == list(range(3 * experts["kept_round"]))
    assert {step["round"] for step in steps} == set(range(1, experts["kept_round"] + 1))


def test_a_killed_second_round_does_not_train_the_first_again(finished, tiny_model_path, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    experts = tmp_path / "run" / "finetune"
    (experts / "manifest.json").unlink()
    first = modified(experts / "round_1")
    last = experts / "round_2"
    if last.exists():
        (last / "manifest.json").unlink()
    arguments = ["--config", str(finished / "sweep" / "winner.yaml"), f"run_dir={tmp_path / 'run'}"]
    assert run_workflow("finetune", arguments) == 0
    assert modified(experts / "round_1") == first
    for name in ("adapter.json", "experts.safetensors"):
        assert (experts / name).stat().st_size == (finished / "finetune" / name).stat().st_size


def test_after_rounds_masked_evaluation_routes_through_the_masks_of_the_kept_round(finished):
    kept = json.loads((finished / "finetune" / "manifest.json").read_text())["notes"]["kept_round"]
    experts = Folder.open(str(finished)).sub("finetune")
    assert read_masks(experts).digest() == read_masks(experts.sub(f"round_{kept}")).digest()
    config = load_config(str(finished / "sweep" / "winner.yaml"))
    run = Run(config, config.model, None, RunDirectory.open(str(finished)))
    assert (folder_of_masks(run, "before"), folder_of_masks(run, "after")) == (IDENTIFY, FINETUNE)
    without_rounds = run.with_config(with_settings(config, {"rounds.max_rounds": 1}))
    assert folder_of_masks(without_rounds, "after") == IDENTIFY


@pytest.mark.exhaustive
def test_rounds_that_give_weight_weigh_the_lagging_batches_and_go_on_from_the_round_before(
    captured, tiny_model_path, tmp_path
):
    shutil.copytree(captured, tmp_path / "run", ignore=shutil.ignore_patterns("finetune", "sweep", "mlflow*"))
    more = ["rounds.max_rounds=2", "rounds.target=1.0", "rounds.action=weight", "rounds.weight_factor=3"]
    arguments = settings(
        tiny_model_path,
        tmp_path / "run",
        *more,
        "finetune.learning_rate=1e-4",
        "finetune.schedule=constant",
        "finetune.weight_decay=0",
    )
    assert run_workflow("finetune", arguments) == 0
    experts = Folder.open(str(tmp_path / "run")).sub("finetune")
    first, second = (experts.sub(f"round_{number}").read_json("manifest.json")["inputs"] for number in (1, 2))
    lagging = read_outcome(experts).notes["rounds"][0]["lagging"]
    assert lagging
    assert (first["weights"], first["start"]) == ({}, "")
    assert (second["weights"], first["masks"]) == ({str(batch): 3.0 for batch in lagging}, second["masks"])
    # AdamW's first step moves a weight by the learning rate; weight 3 makes that three times as much.
    masks = read_masks(experts)
    holders = [set(masks.selected[batch]) for batch in masks.batch_idx]
    alone = set.union(*holders) - set.union(*(one & other for one, other in combinations(holders, 2)))
    assert alone
    model = load_model(ModelConfig(path=str(tiny_model_path)), device="cpu")
    weights = [expert_weights(model, list(alone)), *(load_adapter(experts.sub(f"round_{n}").path)[1] for n in (1, 2))]
    for expert in alone:
        moved = [
            max(float((now[expert][name] - before[expert][name]).abs().max()) for name in before[expert])
            for before, now in pairwise(weights)
        ]
        assert moved == pytest.approx([1e-4, 3e-4], rel=0.1)
