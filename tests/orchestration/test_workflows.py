"""The whole workflow on the tiny model, once, and facts about what it wrote."""

import json
import shutil
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from counting_alone import count_batches
from judge_endpoint import endpoint
from mlflow_server import load_table
from workflow import run_workflow

from moe_ray import pipeline
from moe_ray.config.io import load_config
from moe_ray.config.model import ModelConfig
from moe_ray.evaluation.judges.endpoint import URL_VARIABLE
from moe_ray.finetuning.adapter import adapter_applied
from moe_ray.finetuning.history import read_history
from moe_ray.finetuning.schedule import plan_steps
from moe_ray.identification.mask_files import read_masks
from moe_ray.models.loading import load_model, load_tokenizer
from moe_ray.models.moe_layers import find_moe_layers
from moe_ray.prompts.example_tables import frame_to_batches
from moe_ray.routing.count_store import read_counts
from moe_ray.run_directory import COUNTS
from moe_ray.storage.folder import Folder

pytestmark = [pytest.mark.needs_ray, pytest.mark.slow, pytest.mark.filterwarnings("default")]

STAGES = [
    "prompts", "capture", "identify", "evaluate/before/answers", "evaluate/before/figures", "finetune",
    "evaluate/after/answers", "evaluate/after/figures",
]  # fmt: skip
SUMMARY_KEYS = {
    "batches", "examples", "num_layers", "num_experts", "num_experts_per_tok", "union_experts", "trainable_parameters",
    "total_parameters", "per_batch_unsafe_experts", "empty_layers_per_batch", "before", "after", "change",
    "frozen_parameters_changed", "mlflow_run_id", "seconds",
}  # fmt: skip


def settings(tiny_model_path, run_dir):
    return [
        f"run_dir={run_dir}",
        f"model.path={tiny_model_path}",
        "prompts.max_batches=4",
        "prompts.max_test_examples=8",
        "finetune.epochs=1",
        "finetune.learning_rate=3e-3",
        "capture.tokens_per_forward=1024",
        "evaluate.max_new_tokens=32",
    ]


@pytest.fixture(scope="module")
def finished(ray_cluster, tiny_model_path, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("full") / "run"
    assert run_workflow("full", settings(tiny_model_path, run_dir)) == 0
    return run_dir


@pytest.fixture(scope="module")
def summary(finished):
    return json.loads((finished / "summary.json").read_text())


def test_the_summary_holds_what_the_readme_says(summary):
    assert summary.keys() >= SUMMARY_KEYS
    assert (summary["batches"], summary["examples"]) == (4, 64)
    for when in ("before", "after", "change"):
        for label in ("safe", "unsafe"):
            assert summary[when][f"{label}_refusal_rate"]["n"] == 8
        assert summary[when]["target_loss"]["n"] == 16
        assert summary[when]["neutral_loss"]["n"] == 20
        assert sum(block["target_loss"]["n"] for block in summary[when]["per_batch"].values()) == 16
    assert summary["after"]["routing_drift"]["mean_absolute_change"]["n"] == 16


def test_the_time_went_where_the_summary_says(summary):
    parts = {name: seconds for name, seconds in summary["seconds"].items() if name != "total"}
    assert set(STAGES) <= set(parts)
    assert sum(parts.values()) == pytest.approx(summary["seconds"]["total"], abs=0.1)
    assert parts["other"] < 0.2 * summary["seconds"]["total"]
    waited = summary["start_seconds"]
    assert {"start", "tracking"} <= set(waited) <= set(summary["seconds"])
    assert waited["start"] > 0
    # Of a stage that found its process ready, nothing; both are rounded.
    assert all(0 <= seconds <= summary["seconds"][name] + 0.01 for name, seconds in waited.items())


def test_nothing_outside_the_union_changed(summary):
    assert summary["frozen_parameters_changed"] == 0
    assert 0 < summary["trainable_parameters"] < summary["total_parameters"]


def test_the_repair_lowered_the_loss_on_target_responses(summary):
    assert summary["after"]["target_loss"]["value"] < summary["before"]["target_loss"]["value"]


def test_actors_count_what_the_core_counts_in_one_process(finished, tiny_model_path):
    config = ModelConfig(path=str(tiny_model_path))
    batches = frame_to_batches(pd.read_parquet(finished / "prompts" / "batches.parquet"))
    expected = count_batches(load_model(config, device="cpu"), load_tokenizer(config), batches, rows_per_forward=5)
    got = read_counts(Folder.open(str(finished)).sub(COUNTS))
    assert np.array_equal(got.counts_NLE, expected.counts_NLE)
    assert np.array_equal(got.batch_idx, expected.batch_idx)


def test_grouping_by_batch_gives_the_risk_table_of_the_core(finished):
    folder = Folder.open(str(finished))
    expected = pipeline.identify(read_counts(folder.sub(COUNTS)), seed=0).risk
    got = pd.read_parquet(folder.sub("identify").file("risk_differences.parquet"))
    pd.testing.assert_frame_equal(got[expected.columns], expected, check_dtype=False)


def test_each_step_trained_one_batch_of_the_plan(finished):
    folder = Folder.open(str(finished))
    masks = read_masks(folder.sub("identify"))
    steps = read_history(folder.sub("finetune"))
    planned = plan_steps(masks.trained_batches, epochs=1, batches_per_step=1, seed=0)
    assert [(step["batch_idx"],) for step in steps] == planned
    assert [step["num_experts"] for step in steps] == [len(masks.selected[step["batch_idx"]]) for step in steps]


def test_the_adapter_changes_the_unions_experts_and_no_other(finished, tiny_model_path):
    model = load_model(ModelConfig(path=str(tiny_model_path)), device="cpu")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    masks = read_masks(Folder.open(str(finished)).sub("identify"))
    layers = {layer.name: row for row, layer in enumerate(find_moe_layers(model))}
    with adapter_applied(model, finished / "finetune"):
        for name, tensor in model.state_dict().items():
            row = layers.get(name.rpartition(".")[0])
            if row is None:
                assert torch.equal(tensor, before[name])
                continue
            changed = (tensor != before[name]).flatten(1).any(dim=1).numpy()
            assert np.array_equal(changed, masks.union[row])


def test_mlflow_holds_settings_metrics_and_masks(finished, summary):
    client = mlflow.MlflowClient(f"sqlite:///{finished.parent}/mlflow.db")
    run = client.get_run(summary["mlflow_run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.params["identify.top_k"] == "50"
    (trained,) = (
        other
        for other in client.search_runs([run.info.experiment_id])
        if other.info.run_name == "finetune" and other.data.tags["mlflow.parentRunId"] == run.info.run_id
    )
    losses = client.get_metric_history(trained.info.run_id, "train/loss")
    assert [metric.step for metric in losses] == [0, 1, 2, 3]
    names = {item.path for item in client.list_artifacts(summary["mlflow_run_id"], "identify")}
    assert "identify/masks.npz" in names
    figures = {item.path for item in client.list_artifacts(summary["mlflow_run_id"], "figures")}
    assert figures >= {"figures/risk_overall.svg", "figures/training.svg", "figures/overlap.svg"}
    assert [used.dataset.name for used in run.inputs.dataset_inputs] == ["batches", "test"]
    figure = summary["after"]["unsafe_refusal_rate"]
    logged = {key: run.data.metrics[f"held_out/unsafe_refusal_rate.{key}"] for key in ("low", "high", "n")}
    assert run.data.metrics["held_out/unsafe_refusal_rate"] == figure["value"]
    assert logged == {key: figure[key] for key in ("low", "high", "n")}
    assert 0 <= run.data.metrics["batches_significant"] <= run.data.metrics["batches_tested"] == 4
    assert not [name for name in run.data.metrics if name.startswith("batch/")]
    store = f"sqlite:///{finished.parent}/mlflow.db"
    per_batch = load_table(store, run.info.experiment_id, "tables/batches.json", run.info.run_id)
    assert set(per_batch["batch_idx"].astype(str)) == set(summary["per_batch_unsafe_experts"])
    assert run.data.tags["mlflow.note.content"].startswith("moe-ray compared how often")
    assert {"mlflow.user", "mlflow.source.name"} <= set(run.data.tags)
    svg = Path(client.download_artifacts(run.info.run_id, "figures/training.svg")).read_text()
    assert svg.startswith('<svg width="')
    (model,) = client.search_logged_models([run.info.experiment_id])
    assert {metric.key: metric.value for metric in model.metrics}["repaired/unsafe_refusal_rate"] == figure["value"]


def test_the_pandas_export_can_be_read_and_looped_over(finished):
    (path,) = (finished / "identify").glob("sft_dataset_*.pkl")
    export = pd.read_pickle(path)
    first, second = (set(experts) for experts in export["batch_unsafe_experts"][:2])
    assert all(export["batch_expert_masks"][0][layer, expert] for layer, expert in first)
    assert first
    assert second
    assert export["batch_size"] == 16


def test_the_stored_configuration_gives_the_same_run(finished):
    stored = load_config(str(finished / "config.yaml"))
    assert (stored.prompts.max_batches, stored.finetune.epochs, stored.run_dir) == (4, 1, str(finished))


def test_a_second_run_reuses_every_stage(finished, tiny_model_path, summary, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    assert run_workflow("evaluate", settings(tiny_model_path, tmp_path / "run")) == 0
    for stage in STAGES:
        manifests = [Path(root, stage, "manifest.json").read_text() for root in (finished, tmp_path / "run")]
        assert manifests[0] == manifests[1]


def test_another_threshold_captures_nothing_again(finished, tiny_model_path, tmp_path, caplog):
    shutil.copytree(finished, tmp_path / "run")
    arguments = [*settings(tiny_model_path, tmp_path / "run"), "identify.threshold=0.3"]
    assert run_workflow("identify", arguments) == 0
    masks = read_masks(Folder.open(str(tmp_path / "run")).sub("identify"))
    before = read_masks(Folder.open(str(finished)).sub("identify"))
    assert (masks.union & ~before.union).sum() == 0
    assert masks.union.sum() < before.union.sum()
    for stage, same in (("capture", True), ("identify", False)):
        pair = [Path(root, stage, "manifest.json").read_text() for root in (finished, tmp_path / "run")]
        assert (pair[0] == pair[1]) is same


def test_another_judge_answers_nothing_again(finished, tiny_model_path, tmp_path, monkeypatch):
    shutil.copytree(finished, tmp_path / "run")
    with endpoint(lambda request, call: (200, "REFUSED")) as server:
        monkeypatch.setenv(URL_VARIABLE, server.url)
        arguments = [*settings(tiny_model_path, tmp_path / "run"), "evaluate.judge=endpoint", "evaluate.judge_model=m"]
        assert run_workflow("evaluate", arguments) == 0
    for stage, same in (
        ("evaluate/before/answers", True),
        ("evaluate/after/answers", True),
        ("evaluate/after/figures", False),
    ):
        pair = [Path(root, stage, "manifest.json").read_text() for root in (finished, tmp_path / "run")]
        assert (pair[0] == pair[1]) is same
    judged = [
        pd.read_parquet(tmp_path / "run" / f"evaluate/{when}/figures" / "answers.parquet")
        for when in ("before", "after")
    ]
    assert set(judged[1]["judge"]) == {"endpoint"}
    # Nobody is asked about noise, of which a model after so little training has some.
    asked = [answers[answers["verdict"] != "degenerate"] for answers in judged]
    assert all(answers["refused"].all() for answers in asked)
    assert len(server.requests) == sum(map(len, asked)) > 24


def test_an_interrupted_capture_goes_on_with_what_is_missing(finished, tiny_model_path, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "capture" / "manifest.json").unlink()
    parts = sorted((tmp_path / "run" / "capture" / "counts").glob("*.parquet"))
    kept = {part: part.stat().st_mtime_ns for part in parts[1:]}
    parts[0].unlink()
    assert run_workflow("capture", settings(tiny_model_path, tmp_path / "run")) == 0
    counts = [read_counts(Folder.open(str(root)).sub(COUNTS)) for root in (finished, tmp_path / "run")]
    assert np.array_equal(counts[0].counts_NLE, counts[1].counts_NLE)
    assert {part: part.stat().st_mtime_ns for part in kept} == kept


BAD = {"robot": [{"role": "robot", "content": "hello"}], "long": [{"role": "user", "content": "bread " * 2000}]}


def write_prompts(path, *, bad_splits):
    """Prompts of one category in both splits; in some splits the first safe ones cannot be asked."""
    rows = [
        {
            "id": f"{split}-{label}-{number}",
            "split": split,
            "label": label,
            "category": "fraud",
            "messages": [{"role": "user", "content": f"How do I {verb} the bread number {number}?"}],
        }
        for split in ("train", "test")
        for number in range(32 if split == "train" else 16)
        for label, verb in (("safe", "bake"), ("unsafe", "steal"))
    ]
    for split in bad_splits:
        safe = [row for row in rows if row["split"] == split and row["label"] == "safe"]
        for row, messages in zip(safe, BAD.values(), strict=False):
            row["messages"] = messages
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.exhaustive
def test_prompts_that_cannot_be_asked_are_left_out_wherever_they_are(ray_cluster, tiny_model_path, tmp_path, capsys):
    write_prompts(tmp_path / "prompts.jsonl", bad_splits=("train", "test"))
    arguments = [
        *(f"run_dir={tmp_path}/run", f"model.path={tiny_model_path}", f"prompts.files=[{tmp_path}/prompts.jsonl]"),
        *("prompts.max_batches=4", "finetune.epochs=1", "finetune.num_workers=0", "capture.max_bad_share=0.1"),
        *("evaluate.max_new_tokens=8", "identify.permutations=100", "identify.resamples=0"),
        *("compare.run=true", "compare.names=[all_experts]", "compare.draws=1"),
    ]
    assert run_workflow("full", arguments) == 0
    folder = Folder.open(str(tmp_path / "run"))
    summary = folder.read_json("summary.json")
    assert (summary["quarantined_examples"], summary["held_out_left_out"]) == (2, 2)
    assert set(folder.sub("capture").read_frame("quarantine.parquet")["id"]) == {
        "prompts:train-safe-0",
        "prompts:train-safe-1",
    }
    left_out = folder.sub("prompts").read_frame("left_out.parquet").set_index("id")
    assert left_out["reason"].to_dict() == {
        "prompts:test-safe-0": "not_encoded",
        "prompts:test-safe-1": "too_long",
    }
    assert summary["after"]["safe_refusal_rate"]["n"] == 14
    assert summary["after"]["unsafe_refusal_rate"]["n"] == 16
    strict = [*arguments, f"run_dir={tmp_path}/strict", "capture.max_bad_share=0.01"]
    assert run_workflow("capture", strict) == 2
    assert "2 of 32 test examples cannot be answered" in capsys.readouterr().err


@pytest.mark.exhaustive
def test_the_settings_beside_a_merged_model_make_it_again(finished, tmp_path):
    assert run_workflow("merge", [str(finished), str(tmp_path / "repaired")]) == 0
    again = tmp_path / "again"
    assert run_workflow("full", [str(again), "--config", str(tmp_path / "repaired" / "reproduce.yaml")]) == 0
    masks = [read_masks(Folder.open(str(run)).sub("identify")) for run in (finished, again)]
    assert masks[0].selected == masks[1].selected
    for name in ("adapter.json", "experts.safetensors"):
        assert (again / "finetune" / name).read_bytes() == (finished / "finetune" / name).read_bytes(), name
    summaries = [json.loads((run / "summary.json").read_text()) for run in (finished, again)]
    for when in ("before", "after", "change"):
        assert summaries[0][when] == summaries[1][when], when
    assert run_workflow("merge", [str(again), str(tmp_path / "repaired_again")]) == 0
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("repaired", "repaired_again")]
    assert weights[0] == weights[1]
