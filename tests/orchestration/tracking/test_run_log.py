"""What is sent to MLflow: every step of a training once, figures as plain numbers, and who did the work of a stage."""

import json
import math
import time
from contextlib import nullcontext

import pandas as pd
import pytest
from ablation_run import write_ablation

from moe_ray.finetuning.history import write_history
from moe_ray.orchestration.tracking import run_log
from moe_ray.orchestration.tracking.mlflow_run import RECORD
from moe_ray.run_directory import FINETUNE
from moe_ray.storage.folder import Folder
from moe_ray.storage.stage import Outcome


class Recorder:
    """Takes what a tracker is given, instead of a server."""

    def __init__(self, run_id="parent"):
        self.run_id, self.children, self.metrics, self.params, self.tags = run_id, {}, [], {}, {}
        self.files = {}

    def child(self, name, tags=None):
        self.children[name] = Recorder(f"id of {name}")
        self.children[name].tags = dict(tags or {})
        return nullcontext(self.children[name])

    def log_metrics(self, rows):
        self.metrics += [(step, dict(values)) for step, values in rows]

    def log_params(self, params):
        self.params |= params

    def log_bytes(self, name, data, folder=""):
        self.files[f"{folder}/{name}"] = data

    def log_stored(self, source, name, folder=""):
        assert source.exists(name), name


@pytest.fixture
def folder(tmp_path):
    return Folder.open(str(tmp_path / "stage"))


def step(number):
    return {"step": number, "loss": 1.0 / (1 + number), "epoch": 0, "batches": [{"batch_idx": 3}]}


def test_every_step_of_a_training_is_sent_once_as_it_comes(folder, monkeypatch):
    monkeypatch.setattr(run_log, "_SECONDS_BETWEEN_LOOKS", 0.005)
    parent = Recorder()
    with run_log.stage_run(parent, FINETUNE, folder) as stage:
        for number in (1, 2, 5):
            write_history(folder, [step(n) for n in range(number)])
            wait_until(lambda number=number: len(stage.metrics) >= number)
        write_history(folder, [step(n) for n in range(7)])
    *steps, (_, last) = stage.metrics
    assert steps == [(n, {"train/loss": 1.0 / (1 + n), "train/epoch": 0}) for n in range(7)]
    assert list(last) == ["seconds"]


def test_a_training_that_fails_has_sent_the_steps_it_took(folder):
    parent = Recorder()

    def fails():
        with run_log.stage_run(parent, FINETUNE, folder):
            write_history(folder, [step(0), step(1)])
            raise RuntimeError("of a worker")

    with pytest.raises(RuntimeError, match="of a worker"):
        fails()
    assert [number for number, _ in parent.children[FINETUNE].metrics] == [0, 1]


def wait_until(is_so):
    deadline = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_a_tag_names_the_run_that_did_a_stages_work(tmp_path):
    run = Folder.open(str(tmp_path))
    outcomes = {
        name: Outcome(folder=run.sub(name), notes={}, seconds=0.0, is_reused=is_reused)
        for name, is_reused in (("prompts", False), ("capture", True), ("identify", True), ("evaluate", False))
    }
    with run_log.stage_runs(Recorder())("prompts", run.sub("prompts")):
        pass
    run.sub("capture").write_json(RECORD, {"run_id": "earlier"})
    assert run_log.where_stages_were_run(outcomes) == {
        "stage.prepare": "run id of prepare",
        "stage.capture": "reused from run earlier",
        "stage.identify": "reused from a run without tracking",
    }


def test_a_trial_has_its_settings_as_parameters_and_finite_numbers_as_metrics(folder):
    for name in (run_log.TRIALS, *run_log.HEAT_MAP_PICTURES, run_log.WINNER):
        folder.write_bytes(name, b"")
    trials = pd.DataFrame(
        [
            {"identify.top_k": 6, "state": "finished", "message": "fine", "objective": 0.5, "epochs": 2},
            {"identify.top_k": 12, "state": "failed", "message": "no expert", "objective": math.nan, "epochs": 0},
        ]
    )
    parent = Recorder()
    run_log.log_trials(parent, trials, ["identify.top_k"], folder)
    first, second = parent.children["trial 1"], parent.children["trial 2"]
    assert (first.params, second.params) == ({"identify.top_k": 6}, {"identify.top_k": 12})
    assert first.metrics == [(0, {"objective": 0.5, "epochs": 2.0})]
    assert second.metrics == [(0, {"epochs": 0.0})]
    assert second.tags == {"state": "failed", "rank": 2, "message": "no expert", "pareto_front": False}


@pytest.mark.slow
def test_the_causal_check_is_a_verdict_and_plain_numbers(tmp_path):
    found = write_ablation(Folder.open(str(tmp_path)))
    tracker = Recorder()
    tracker.log_tags = tracker.tags.update
    run_log.log_ablation(tracker, found.as_dict())
    assert tracker.tags == {"ablate.verdict": "causal"}
    figures = {name: value for step, row in tracker.metrics for name, value in row.items() if step == 0}
    assert figures["ablate/selected/specific"] == pytest.approx(1.5, abs=0.1)
    assert {
        "ablate/matched/lift",
        "ablate/matched/lift_low",
        "ablate/matched/p_sets",
        "ablate/coalition_1/unsafe",
    } <= set(figures)
    assert {step for step, _ in tracker.metrics} == {0}
    (table,) = tracker.files.values()
    assert [row[0] for row in json.loads(table)["data"]] == [0, 1, 2, 3]
    assert all(isinstance(value, float) for _, row in tracker.metrics for value in row.values())
