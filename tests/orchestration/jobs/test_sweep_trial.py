"""A trial is a stage: what could not be trained is a result, what the outside did not do is tried again."""

from __future__ import annotations

from typing import ClassVar

import pytest

from moe_ray.config.model import ModelConfig
from moe_ray.config.run import Config
from moe_ray.errors import InputError, OutsideFailed
from moe_ray.orchestration.jobs import sweep_trial
from moe_ray.orchestration.jobs.sweep import _first_error
from moe_ray.orchestration.jobs.sweep_trial import SweepJob, read_trials
from moe_ray.storage.stage import is_finished


class FakeTrial(sweep_trial._Trial):
    """Ends as the test says, instead of training."""

    endings: ClassVar[list] = []

    def run(self):
        ending = self.endings.pop(0)
        if isinstance(ending, Exception):
            raise ending
        return self.record("finished", {"value": ending, "message": "trained"})


@pytest.fixture
def told(monkeypatch):
    """What Ray Tune was told."""
    reports = []
    monkeypatch.setattr(sweep_trial, "_Trial", FakeTrial)
    monkeypatch.setattr(sweep_trial.tune, "report", reports.append)
    monkeypatch.setattr(sweep_trial.tune, "get_checkpoint", lambda: None)
    return reports


@pytest.fixture
def job(tmp_path):
    return SweepJob(model=ModelConfig(), config=Config(), run_url=str(tmp_path), inputs={"counts": "abc"})


SETTINGS = {"identify.top_k": 5}


def trials_of(job):
    return [job.trials.sub(name) for name in job.trials.names()]


def test_a_trial_whose_judge_was_unreachable_is_run_again(job, told, monkeypatch):
    monkeypatch.setattr(FakeTrial, "endings", [OutsideFailed("the judge does not answer"), 0.75])
    with pytest.raises(OutsideFailed, match="does not answer"):
        sweep_trial.sweep_trial(SETTINGS, job=job)
    assert not any(map(is_finished, trials_of(job)))
    assert told == []
    sweep_trial.sweep_trial(SETTINGS, job=job)
    assert read_trials(job.trials)["state"].tolist() == ["finished"]
    assert told == [{"value": 0.75, "message": "trained"}]


def test_settings_that_cannot_be_trained_are_a_result_and_are_not_tried_again(job, told, monkeypatch):
    monkeypatch.setattr(FakeTrial, "endings", [InputError("no expert is above the threshold")])
    for _ in range(2):
        sweep_trial.sweep_trial(SETTINGS, job=job)
    assert read_trials(job.trials)["state"].tolist() == ["failed"]
    assert [report["message"] for report in told] == [
        "could not be trained: no expert is above the threshold",
        "could not be trained: no expert is above the threshold (done before)",
    ]


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
    assert not isinstance(_first_error([RuntimeError("a bug")]), OutsideFailed)
