"""One run that sweeps, goes on with the winner, fine-tunes in rounds and holds itself against baselines; and its parts."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from itertools import combinations, pairwise
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from paths import ROOT
from workflow import run_workflow

from moe_ray.config.io import load_config, with_settings
from moe_ray.config.model import ModelConfig
from moe_ray.finetuning.adapter import adapter_applied, expert_weights, load_adapter
from moe_ray.finetuning.history import read_history
from moe_ray.identification.mask_files import read_masks
from moe_ray.models.loading import load_model, load_tokenizer
from moe_ray.orchestration.cluster.model_process import BaseModel
from moe_ray.orchestration.jobs.sweep_job import read_trials
from moe_ray.orchestration.run import Run
from moe_ray.orchestration.stages.evaluate import folder_of_masks
from moe_ray.prompts.example_tables import frame_to_batches
from moe_ray.routing.count_store import read_counts
from moe_ray.run_directory import COUNTS, FINETUNE, IDENTIFY, RunDirectory
from moe_ray.storage.folder import Folder
from moe_ray.storage.stage import read_outcome
from moe_ray.studies.baselines import OURS
from moe_ray.studies.comparison import BASE
from moe_ray.studies.objective import plain_metrics
from moe_ray.studies.trial import identify_masks, measurer, run_trial

pytestmark = [pytest.mark.needs_ray, pytest.mark.slow, pytest.mark.filterwarnings("default")]

SPACE = "sweep.space={identify.threshold: [0.05, 0.99], identify.top_k: [6, 12]}"
LOSS_TOLERANCE = 1e-4
"""Nats per token; another process may split sums otherwise."""


def settings(tiny_model_path, run_dir, *more):
    return [
        f"run_dir={run_dir}",
        f"model.path={tiny_model_path}",
        "prompts.max_batches=3",
        "prompts.max_test_examples=6",
        "finetune.epochs=1",
        "finetune.num_workers=0",
        "evaluate.max_new_tokens=12",
        "identify.permutations=100",
        "identify.resamples=0",
        *more,
    ]


def study(tiny_model_path, run_dir, *more):
    return settings(
        tiny_model_path,
        run_dir,
        "sweep.run=true",
        SPACE,
        "rounds.max_rounds=2",
        "rounds.target=1.0",
        "rounds.action=identify",
        "compare.run=true",
        "compare.names=[freezing_only,random,full]",
        "compare.draws=1",
        *more,
    )


def modified(folder):
    return {path: path.stat().st_mtime_ns for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def captured(ray_cluster, tiny_model_path, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("study") / "run"
    assert run_workflow("capture", settings(tiny_model_path, run_dir)) == 0
    return run_dir


@pytest.fixture(scope="module")
def finished(captured, tiny_model_path):
    """The whole study on the capture that is there; a second capture would be an error."""
    before = modified(captured / "capture")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moe_ray.orchestration.jobs.capture.capture", _must_not_be_called)
        assert run_workflow("full", study(tiny_model_path, captured)) == 0
    assert modified(captured / "capture") == before
    return captured


def _must_not_be_called(*args, **kwargs):
    raise AssertionError("captured again")


@pytest.fixture(scope="module")
def summary(finished):
    return json.loads((finished / "summary.json").read_text())


@pytest.fixture(scope="module")
def trials(finished):
    return pd.read_parquet(finished / "sweep" / "trials.parquet")


def test_every_trial_identified_from_the_stored_capture_in_less_than_a_second(finished, trials):
    trained = trials[trials["state"] == "finished"]
    assert (trained["identify_seconds"] < 1).all()
    assert len(trained) == 2
    folder = Folder.open(str(finished))
    counts = read_counts(folder.sub(COUNTS))
    for trial in trained.to_dict("records"):
        values = {key: trial[key] for key in ("identify.threshold", "identify.top_k")}
        config = with_settings(load_config(str(finished / "config.yaml")), values)
        assert identify_masks(counts, config.identify, seed=0).digest() == trial["masks"]


def test_trials_that_cannot_be_trained_rank_last_and_say_why(trials):
    assert trials["state"].tolist() == ["finished", "finished", "failed", "failed"]
    assert trials["message"].iloc[-1].startswith("could not be trained: no expert of any of 3 batches")


def test_one_process_ran_all_trials_on_one_loaded_model(trials):
    assert trials["process"].nunique() == 1
    assert trials["process"].iloc[0] != os.getpid()


def test_a_trial_in_a_reused_process_gives_what_a_fresh_process_gives(finished, trials, tiny_model_path):
    folder = Folder.open(str(finished))
    batches = frame_to_batches(folder.sub("prompts").read_frame("batches.parquet"))
    validation = folder.sub("prompts").read_frame("validation.parquet")
    counts = read_counts(folder.sub(COUNTS))
    model = ModelConfig(path=str(tiny_model_path))
    for trial in trials[trials["state"] == "finished"].to_dict("records"):
        values = {key: trial[key] for key in ("identify.threshold", "identify.top_k")}
        config = with_settings(load_config(str(finished / "config.yaml")), values)
        base, tokenizer = load_model(model, device="cpu"), load_tokenizer(model)
        outcome = run_trial(
            base,
            tokenizer,
            batches,
            identify_masks(counts, config.identify, seed=0),
            config=config.finetune,
            seed=0,
            measure=measurer(base, tokenizer, validation, config.evaluate),
        )
        for name, value in plain_metrics(outcome.measured.answers).items():
            assert trial[name] == pytest.approx(value, abs=LOSS_TOLERANCE), name
        assert trial["frozen_parameters_changed"] == outcome.frozen_parameters_changed == 0


def test_the_run_went_on_with_the_winner(finished, summary, trials):
    winner = summary["sweep"]["winner"]
    assert winner == {key: trials.iloc[0][key] for key in winner}
    assert trials["value"].iloc[0] == trials["value"].max()
    assert read_masks(Folder.open(str(finished)).sub("identify")).digest() == trials["masks"].iloc[0]
    assert summary["before"]["unsafe_refusal_rate"]["n"] == 6


def test_the_winners_file_is_a_configuration_of_full_py_and_repeats_the_run(
    finished, tiny_model_path, summary, tmp_path
):
    config = load_config(str(finished / "sweep" / "winner.yaml"))
    assert not config.sweep.run
    assert config.identify.top_k == summary["sweep"]["winner"]["identify.top_k"]
    shutil.copytree(finished, tmp_path / "run")
    arguments = ["--config", str(finished / "sweep" / "winner.yaml"), f"run_dir={tmp_path / 'run'}"]
    assert run_workflow("evaluate", arguments) == 0
    for stage in ("identify", "finetune", "evaluate/after/figures"):
        manifests = [Path(root, stage, "manifest.json").read_text() for root in (finished, tmp_path / "run")]
        assert manifests[0] == manifests[1]


def test_the_heat_map_is_a_picture(finished):
    assert (finished / "sweep" / "heat_map.png").read_bytes().startswith(b"\x89PNG")
    assert "identify.top_k" in (finished / "sweep" / "heat_map.svg").read_text()


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


def test_the_baselines_took_the_same_steps_on_the_same_prompts(finished, summary):
    table = pd.read_parquet(finished / "compare" / "comparison.parquet").set_index("arm")
    assert list(table.index) == [BASE, OURS, "freezing_only", "random_0", "full"]
    losses = {name: json.loads((finished / "compare" / name / "losses.json").read_text()) for name in table.index[1:]}
    assert {len(steps) for steps in losses.values()} == {3}
    assert (table["unsafe_refusal_rate_n"] == 6).all()
    assert table.loc["random_0", "experts_per_batch"] == table.loc[OURS, "experts_per_batch"]
    model = load_model(load_config(str(finished / "config.yaml")).model, device="cpu")
    assert table.loc["full", "trainable_parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert table.loc[BASE, "trainable_parameters"] == 0
    answers = [pd.read_parquet(finished / "compare" / name / "answers.parquet")["id"] for name in table.index]
    assert all(frame.equals(answers[0]) for frame in answers)
    assert "Per-batch masks refused unsafe prompts (n = 6)" in summary["compare"]["verdict"]


def test_the_winner_is_not_trained_again_and_is_byte_for_byte_what_a_run_without_a_sweep_trains(
    finished, trials, summary, tiny_model_path, tmp_path
):
    trained_by = trials["trained_by"].iloc[0]
    first = read_outcome(Folder.open(str(finished / "finetune" / "round_1")))
    assert first.notes["trained_by"] == trained_by
    keeping = [path.parent.name for path in (finished / "sweep" / "trials").glob("*/experts.safetensors")]
    assert keeping == [trained_by]
    shutil.copytree(
        finished, tmp_path / "run", ignore=shutil.ignore_patterns("sweep", "mlflow*", "finetune", "compare")
    )
    winner = [f"{key}={value}" for key, value in summary["sweep"]["winner"].items()]
    assert run_workflow("finetune", settings(tiny_model_path, tmp_path / "run", *winner)) == 0
    for name in ("experts.safetensors", "adapter.json"):
        alone = (tmp_path / "run" / "finetune" / name).read_bytes()
        assert alone == (finished / "finetune" / "round_1" / name).read_bytes()
    assert "trained_by" not in read_outcome(Folder.open(str(tmp_path / "run" / "finetune"))).notes
    losses = [
        [step["loss"] for step in read_history(Folder.open(str(folder)))]
        for folder in (tmp_path / "run" / "finetune", finished / "finetune" / "round_1")
    ]
    assert losses[0] == losses[1]


def test_the_base_is_measured_as_the_evaluation_before_measures_it(finished, summary):
    table = pd.read_parquet(finished / "compare" / "comparison.parquet").set_index("arm")
    for name in ("unsafe_refusal_rate", "safe_refusal_rate"):
        assert table.loc[BASE, name] == summary["before"][name]["value"]
    assert table.loc[BASE, "neutral_loss"] == 0
    assert table.loc["full", "neutral_loss"] != 0


def test_another_baseline_runs_and_the_finished_ones_do_not(finished, tiny_model_path, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    before = modified(tmp_path / "run" / "compare" / "random_0")
    arguments = study(tiny_model_path, tmp_path / "run", "compare.names=[random,global]")
    assert run_workflow("compare", arguments) == 0
    assert modified(tmp_path / "run" / "compare" / "random_0") == before
    table = pd.read_parquet(tmp_path / "run" / "compare" / "comparison.parquet")
    assert table["arm"].tolist() == [BASE, OURS, "random_0", "global"]


def test_trials_and_baselines_are_nested_under_the_run_in_mlflow(finished, summary):
    client = mlflow.MlflowClient(f"sqlite:///{finished}/mlflow/mlflow.db")
    experiment = client.get_experiment_by_name("moe-ray")
    nested = client.search_runs([experiment.experiment_id], f"tags.`mlflow.parentRunId` = '{summary['mlflow_run_id']}'")
    names = {run.info.run_name: run for run in nested}
    assert {"trial 1", "trial 4", f"compare {OURS}", "compare full"} <= set(names)
    assert names["trial 1"].data.params["identify.top_k"] == str(summary["sweep"]["winner"]["identify.top_k"])
    artifacts = {item.path for item in client.list_artifacts(summary["mlflow_run_id"], "sweep")}
    assert {"sweep/heat_map.png", "sweep/winner.yaml"} <= artifacts


def test_a_base_model_that_a_trial_left_changed_is_noticed(tiny_model_path):
    base = BaseModel(ModelConfig(path=str(tiny_model_path)), 1)
    base.check()
    with torch.no_grad():
        next(base.model.parameters())[0, 0] += 1
    with pytest.raises(RuntimeError, match=r"left \d+ numbers of the base model changed"):
        base.check()


def start_and_stop(arguments, records, num_finished, log, how=signal.SIGKILL):
    """Starts a sweep in a process of its own and stops it when some trials have a record; the exit status."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "workflows" / "sweep.py"), *arguments]
    with log.open("w") as output:
        sweep = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 240
    try:
        while time.monotonic() < deadline and sweep.poll() is None:
            if len(list(records.glob("*/manifest.json"))) >= num_finished:
                sweep.send_signal(how)
                return sweep.wait(timeout=120)
            time.sleep(0.02)
    finally:
        sweep.kill()
        sweep.wait()
    raise AssertionError(f"fewer than {num_finished} trials had a record:\n{log.read_text()[-3000:]}")


@pytest.mark.exhaustive
def test_a_killed_sweep_trains_no_finished_trial_again(captured, tiny_model_path, tmp_path):
    shutil.copytree(captured, tmp_path / "run", ignore=shutil.ignore_patterns("sweep", "mlflow*"))
    space = "sweep.space={identify.top_k: [3, 4, 5, 6]}"
    arguments = settings(tiny_model_path, tmp_path / "run", space)
    records = tmp_path / "run" / "sweep" / "trials"
    start_and_stop(arguments, records, 2, tmp_path / "log")
    # What a trial learned goes when another one is better; what it measured stays.
    before = {path: time for path, time in modified(records).items() if (path.parent / "manifest.json").exists()}
    before = {path: time for path, time in before.items() if path.name in ("manifest.json", "record.json")}
    assert 2 <= len({path.parent for path in before}) < 4
    assert not (tmp_path / "run" / "sweep" / "manifest.json").exists()
    assert run_workflow("sweep", arguments) == 0
    after = modified(records)
    assert {path: after[path] for path in before} == before
    assert len(list(records.glob("*/manifest.json"))) == 4
    assert read_trials(Folder.open(str(records.parent / "records")))["process"].nunique() == 2


@pytest.mark.exhaustive
def test_an_interrupted_sweep_is_not_a_finished_one(captured, tiny_model_path, tmp_path):
    shutil.copytree(captured, tmp_path / "run", ignore=shutil.ignore_patterns("sweep", "mlflow*"))
    arguments = settings(tiny_model_path, tmp_path / "run", "sweep.space={identify.top_k: [3, 4, 5, 6]}")
    trials = tmp_path / "run" / "sweep" / "trials"
    assert start_and_stop(arguments, trials, 1, tmp_path / "log", how=signal.SIGINT) == 130
    assert "the same command goes on where this one stopped" in (tmp_path / "log").read_text()
    assert not (tmp_path / "run" / "sweep" / "manifest.json").exists()


@pytest.mark.exhaustive
def test_a_wider_space_trains_only_what_is_new(captured, tiny_model_path, tmp_path):
    shutil.copytree(captured, tmp_path / "run", ignore=shutil.ignore_patterns("sweep", "mlflow*"))
    trained = {}
    for space, objective in (("[5, 6]", "refusal_margin"), ("[5, 6, 7]", "target_loss")):
        more = (f"sweep.space={{identify.top_k: {space}}}", f"sweep.objective={objective}")
        assert run_workflow("sweep", settings(tiny_model_path, tmp_path / "run", *more)) == 0
        manifests = (tmp_path / "run" / "sweep" / "trials").glob("*/manifest.json")
        trained[space] = {path: path.stat().st_mtime_ns for path in manifests}
    assert trained["[5, 6]"].items() < trained["[5, 6, 7]"].items()
    table = pd.read_parquet(tmp_path / "run" / "sweep" / "trials.parquet")
    assert sorted(table["identify.top_k"]) == [5, 6, 7]
    assert (table["objective"] == -table["target_loss"]).all()


@pytest.mark.exhaustive
def test_asha_stops_what_is_behind_and_no_trial_starts_from_another_ones_state(captured, tiny_model_path, tmp_path):
    shutil.copytree(captured, tmp_path / "run", ignore=shutil.ignore_patterns("sweep", "mlflow*"))
    space = "sweep.space={finetune.learning_rate: [0.005, 1e-9, 2e-9, 3e-9]}"
    arguments = settings(
        tiny_model_path,
        tmp_path / "run",
        space,
        "sweep.scheduler=asha",
        "sweep.objective=target_loss",
        "sweep.run=true",
    )
    assert run_workflow("sweep", [*arguments, "finetune.epochs=3", "identify.top_k=6"]) == 0
    trials = pd.read_parquet(tmp_path / "run" / "sweep" / "trials.parquet")
    assert trials["finetune.learning_rate"].iloc[0] == 0.005
    assert trials["state"].iloc[0] == "finished"
    stopped = trials[trials["state"] == "stopped"]
    assert len(stopped) >= 2
    assert (stopped["epochs"] < 3).all()
    (base_metrics,) = (tmp_path / "run" / "sweep" / "trials").glob("base-*.json")
    base = json.loads(base_metrics.read_text())
    # A rate of next to nothing leaves the base as it is, unless the trial began where another one had got to.
    assert np.allclose(stopped["target_loss"], base["target_loss"], atol=LOSS_TOLERANCE)
    assert trials["epochs"].iloc[0] == 3


@pytest.mark.exhaustive
@pytest.mark.parametrize("search", ["random", "optuna"])
def test_values_are_drawn_within_the_space(captured, tiny_model_path, tmp_path, search):
    shutil.copytree(captured, tmp_path / "run", ignore=shutil.ignore_patterns("sweep", "mlflow*"))
    space = "sweep.space={identify.top_k: {randint: [3, 9]}, finetune.learning_rate: {loguniform: [1e-4, 1e-2]}}"
    arguments = settings(tiny_model_path, tmp_path / "run", space, f"sweep.search={search}", "sweep.num_trials=3")
    assert run_workflow("sweep", arguments) == 0
    trials = pd.read_parquet(tmp_path / "run" / "sweep" / "trials.parquet")
    assert len(trials) == 3
    assert trials["identify.top_k"].between(3, 8).all()
    assert trials["finetune.learning_rate"].between(1e-4, 1e-2).all()
    assert trials["finetune.learning_rate"].nunique() == 3


def test_what_needs_another_capture_is_refused_before_ray_starts(tiny_model_path, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("moe_ray.orchestration.cluster.ray_session.ray_session", _must_not_be_called)
    arguments = settings(tiny_model_path, tmp_path / "run", "sweep.space={capture.weights: [true, false]}")
    assert run_workflow("sweep", arguments) == 2
    assert "needs another capture" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
