"""A trial is a stage: what could not be trained is a result, what the outside did not do is tried again."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import pytest

from moe_ray.config.io import with_settings
from moe_ray.config.model import ModelConfig
from moe_ray.config.run import Config
from moe_ray.errors import FrozenChanged, InputError, NothingSelected, NotTrainable, OutsideFailed
from moe_ray.orchestration.jobs import sweep_trial
from moe_ray.orchestration.jobs.sweep import _first_error
from moe_ray.orchestration.jobs.sweep_trial import SweepJob, Trial, read_trials
from moe_ray.run_directory import RunDirectory
from moe_ray.storage.stage import is_finished

METRICS = {"unsafe_refusal_rate": 0.75, "safe_refusal_rate": 0.25, "target_loss": 1.5, "safe_target_loss": 1.0}


class FakeTrial(Trial):
    """Ends as the test says, instead of training."""

    endings: ClassVar[list] = []

    def _train_and_measure(self, folder):
        ending = self.endings.pop(0)
        if isinstance(ending, Exception):
            raise ending
        self.about |= {"identify_seconds": 0.5, "union_experts": 3}
        return ending

    def _base_metrics(self):
        return {"safe_target_loss": 0.5}


@pytest.fixture
def told(monkeypatch):
    """What Ray Tune was told."""
    reports = []
    monkeypatch.setattr(sweep_trial, "Trial", FakeTrial)
    monkeypatch.setattr(sweep_trial.tune, "report", reports.append)
    monkeypatch.setattr(sweep_trial.tune, "get_checkpoint", lambda: None)
    return reports


@pytest.fixture
def job(tmp_path):
    return SweepJob(model=ModelConfig(), config=Config(), run_url=str(tmp_path), inputs={"counts": "abc"})


SETTINGS = {"identify.top_k": 5}


def trials_of(job):
    return [job.trials.sub(name) for name in job.trials.names()]


def with_sweep(job, **settings):
    config = with_settings(job.config, {f"sweep.{name}": value for name, value in settings.items()})
    return replace(job, config=config)


def test_a_trial_whose_judge_was_unreachable_is_run_again(job, told, monkeypatch):
    monkeypatch.setattr(FakeTrial, "endings", [OutsideFailed("the judge does not answer"), METRICS])
    with pytest.raises(OutsideFailed, match="does not answer"):
        sweep_trial.sweep_trial(SETTINGS, job=job)
    assert not any(map(is_finished, trials_of(job)))
    assert told == []
    sweep_trial.sweep_trial(SETTINGS, job=job)
    assert read_trials(job.records)["state"].tolist() == ["finished"]
    assert len(told) == 1


@pytest.mark.parametrize("where", ["base", "measure"])
def test_a_model_or_judge_that_refuses_is_no_fault_of_the_settings(job, told, monkeypatch, where):
    """It ends the sweep with its own sentence, and the trial is run again by the next one."""

    def refuses(*args):
        raise InputError("check evaluate.judge_model")

    monkeypatch.setattr(sweep_trial, "Trial", Trial)
    if where == "base":
        monkeypatch.setattr(sweep_trial, "base_model", refuses)
    else:
        monkeypatch.setattr(sweep_trial, "measurer", lambda *args: refuses)
        monkeypatch.setattr(Trial, "base", type("Base", (), {"model": None, "tokenizer": None})())
    monkeypatch.setattr(RunDirectory, "validation", property(lambda self: "frame"))
    with pytest.raises(InputError, match=r"check evaluate\.judge_model") as error:
        sweep_trial.sweep_trial(SETTINGS, job=job)
    assert not any(map(is_finished, trials_of(job)))
    assert job.records.names() == []
    assert _first_error([error.value]) is error.value


@pytest.mark.parametrize("kind", [NothingSelected, NotTrainable])
def test_settings_that_cannot_be_trained_are_a_result_and_are_not_tried_again(job, told, monkeypatch, kind):
    monkeypatch.setattr(FakeTrial, "endings", [kind("no expert is above the threshold")])
    for _ in range(2):
        sweep_trial.sweep_trial(SETTINGS, job=job)
    assert read_trials(job.records)["state"].tolist() == ["failed"]
    assert [report["message"] for report in told] == [
        "could not be trained: no expert is above the threshold",
        "could not be trained: no expert is above the threshold (done before)",
    ]


def test_another_objective_or_bound_scores_a_finished_trial_anew_and_trains_nothing(job, told, monkeypatch):
    monkeypatch.setattr(FakeTrial, "endings", [METRICS])
    sweep_trial.sweep_trial(SETTINGS, job=with_sweep(job, max_forgetting=1.0))
    job.records.clear()
    sweep_trial.sweep_trial(SETTINGS, job=with_sweep(job, max_forgetting=1.0, objective="unsafe_refusal"))
    sweep_trial.sweep_trial(SETTINGS, job=with_sweep(job, max_forgetting=0.25))
    assert [report["value"] for report in told] == [0.5, 0.75, 0.5 - 10]
    (trial,) = read_trials(job.records).to_dict("records")
    assert (trial["state"], trial["is_within_bound"], trial["union_experts"]) == ("finished", False, 3)


def test_trials_of_other_sweeps_are_kept_and_not_shown(job, told, monkeypatch):
    monkeypatch.setattr(FakeTrial, "endings", [METRICS, METRICS])
    sweep_trial.sweep_trial({"identify.top_k": 5}, job=job)
    job.records.clear()
    sweep_trial.sweep_trial({"identify.top_k": 6}, job=job)
    assert read_trials(job.records)["identify.top_k"].tolist() == [6]
    assert len(trials_of(job)) == 2


@pytest.mark.parametrize(
    ("settings", "is_another"),
    [
        ({"finetune.epochs": 9}, True),
        ({"identify.threshold": 0.5}, True),
        ({"finetune.num_workers": 4}, True),  # as many batches a step, since batches_per_step is 0
        ({"identify.permutations": 7, "identify.resamples": 7}, False),
        ({"finetune.rows_per_forward": 3, "finetune.monitor": False}, False),
        ({"rounds.target": 0.5}, False),
        ({"sweep.scheduler": "asha"}, True),  # whose trials have a measurement of every epoch
        ({"sweep.objective": "unsafe_refusal"}, False),
    ],
)
def test_what_a_trials_measurements_depend_on(job, settings, is_another):
    other = replace(job, config=with_settings(job.config, settings))
    assert (Trial(job, SETTINGS).inputs() != Trial(other, SETTINGS).inputs()) is is_another


def test_a_fault_of_ours_leaves_no_record_and_is_not_taken_for_a_result(job, told, monkeypatch):
    monkeypatch.setattr(FakeTrial, "endings", [RuntimeError("a bug")])
    with pytest.raises(RuntimeError, match="a bug"):
        sweep_trial.sweep_trial(SETTINGS, job=job)
    assert not any(map(is_finished, trials_of(job)))


def test_a_sweep_whose_judge_was_unreachable_says_so_in_one_sentence():
    error = _first_error([OutsideFailed("the judge does not answer")])
    assert isinstance(error, OutsideFailed)
    assert "\n" not in str(error)
    assert "it goes on with these trials" in str(error)
    frozen = FrozenChanged("3 numbers changed")
    assert _first_error([frozen]) is frozen
    assert isinstance(_first_error([RuntimeError("a bug")]), RuntimeError)
