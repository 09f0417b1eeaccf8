"""A sweep of a whole run: its trials, the winner that the run goes on with, and what a kill leaves."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from paths import ROOT
from study_runs import LOSS_TOLERANCE, modified, must_not_be_called, settings
from workflow import run_workflow

from moe_ray.config.io import load_config, with_settings
from moe_ray.config.model import ModelConfig
from moe_ray.finetuning.history import read_history
from moe_ray.identification.mask_files import read_masks
from moe_ray.models.loading import load_model, load_tokenizer
from moe_ray.orchestration.cluster.model_process import BaseModel
from moe_ray.orchestration.jobs.sweep_job import read_trials
from moe_ray.prompts.example_tables import frame_to_batches
from moe_ray.routing.count_store import read_counts
from moe_ray.run_directory import COUNTS
from moe_ray.storage.folder import Folder
from moe_ray.storage.stage import read_outcome
from moe_ray.studies.objective import plain_metrics
from moe_ray.studies.trial import identify_masks, measurer, run_trial

pytestmark = [pytest.mark.needs_ray, pytest.mark.slow, pytest.mark.filterwarnings("default")]


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
    monkeypatch.setattr("moe_ray.orchestration.cluster.ray_session.ray_session", must_not_be_called)
    arguments = settings(tiny_model_path, tmp_path / "run", "sweep.space={capture.weights: [true, false]}")
    assert run_workflow("sweep", arguments) == 2
    assert "needs another capture" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
