"""A trial is a stage: what could not be trained is a result, what the outside did not do is tried again."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import ClassVar

import pytest

from moe_ray.config.io import with_settings
from moe_ray.config.model import ModelConfig
from moe_ray.config.run import Config
from moe_ray.errors import FrozenChanged, InputError, NothingSelected, NotTrainable, OutsideFailed
from moe_ray.experts import Expert, masks_from_experts
from moe_ray.orchestration.cluster import leases as leases_module
from moe_ray.orchestration.cluster.leases import Leases
from moe_ray.orchestration.jobs import sweep_trial
from moe_ray.orchestration.jobs.sweep import _first_error
from moe_ray.orchestration.jobs.sweep_job import SweepJob, read_trials
from moe_ray.orchestration.jobs.sweep_trial import Trial
from moe_ray.run_directory import RunDirectory
from moe_ray.storage.fingerprint import content_hash
from moe_ray.storage.stage import is_finished
from moe_ray.studies.kept_training import training_settings

METRICS = {
    "unsafe_refusal_rate": 0.75,
    "safe_refusal_rate": 0.25,
    "safe_cost_rate": 0.25,
    "target_loss": 1.5,
    "safe_target_loss": 1.0,
}


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
    return [job.trials.sub(name) for name in job.trials.names() if not name.endswith(".json")]


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


MASKS = masks_from_experts({0: (Expert(0, 1),), 1: (Expert(1, 2),)}, layers=(0, 1), num_experts=4)
OTHER_MASKS = masks_from_experts({0: (Expert(0, 3),), 1: (Expert(1, 2),)}, layers=(0, 1), num_experts=4)


class CountedTrial(Trial):
    """Writes down what it is asked to train, and measures as the test says."""

    trained: ClassVar[list] = []
    epochs_of_a_training: ClassVar[int] = 1
    stopped: ClassVar[tuple] = ()

    def _train(self, folder, masks, learned):
        self.trained.append(learned)
        if len(self.trained) in self.stopped:
            raise SystemExit
        self.about |= {"trainable_parameters": 7, "frozen_parameters_changed": 0}
        self.about |= {"train_seconds": 2.0, "evaluate_seconds": 1.0}
        for epoch in range(self.epochs_of_a_training - 1):
            metrics = METRICS | {"unsafe_refusal_rate": 0.25 * epoch}
            sweep_trial.tune.report(self._record(folder, "stopped", self._scored(metrics)))
        return METRICS

    def _base_metrics(self):
        return {"safe_target_loss": 0.5}


@pytest.fixture
def trained(told, monkeypatch):
    """What was trained; a `top_k` of 9 selects other experts than every other one."""
    monkeypatch.setattr(sweep_trial, "Trial", CountedTrial)
    monkeypatch.setattr(CountedTrial, "trained", [])
    monkeypatch.setattr(
        sweep_trial,
        "identify_stored_masks",
        lambda parts, selection, seed: OTHER_MASKS if selection.top_k == 9 else MASKS,
    )
    return CountedTrial.trained


def records_of(job):
    return read_trials(job.records).set_index("identify.top_k").sort_index()


def test_the_same_masks_and_training_settings_are_trained_once_and_the_record_says_whose_training_it_is(
    job, trained, told
):
    for top_k in (5, 6, 9, 7):
        sweep_trial.sweep_trial({"identify.top_k": top_k}, job=job)
    assert [inputs["masks"] for inputs in trained] == [MASKS.digest(), OTHER_MASKS.digest()]
    records = records_of(job)
    first = content_hash(CountedTrial(job, {"identify.top_k": 5}).inputs())
    assert records["trained_by"].tolist()[:3] == [first] * 3
    assert records.loc[9, "trained_by"] not in ("", first)
    assert records["train_seconds"].tolist() == [2.0, 0.0, 0.0, 2.0]
    assert (records["state"] == "finished").all()
    assert records["value"].nunique() == 1
    assert len(told) == 4


@pytest.mark.parametrize(
    "settings", [{"finetune.learning_rate": 0.5}, {"seed": 4}, {"finetune.patience": 3}, {"sweep.scheduler": "asha"}]
)
def test_another_training_with_the_same_masks_is_trained(job, trained, settings):
    job = replace(job, sources={"seed": 0}, inputs={"counts": "abc", "validation": "v"})
    sweep_trial.sweep_trial(SETTINGS, job=job)
    other = replace(job, config=with_settings(job.config, settings), sources={"seed": settings.get("seed", 0)})
    sweep_trial.sweep_trial({"identify.top_k": 6}, job=other)
    assert len(trained) == 2


def test_other_counts_or_another_judge_are_measured_anew(job, trained):
    sweep_trial.sweep_trial(SETTINGS, job=job)
    sweep_trial.sweep_trial(SETTINGS, job=replace(job, inputs={"counts": "abc", "judge": "another"}))
    assert len(trained) == 2


def test_a_training_that_was_stopped_is_not_shared(job, trained, monkeypatch):
    monkeypatch.setattr(CountedTrial, "stopped", (1,))
    with pytest.raises(SystemExit):
        sweep_trial.sweep_trial(SETTINGS, job=job)
    sweep_trial.sweep_trial({"identify.top_k": 6}, job=job)
    assert len(trained) == 2


def test_a_trial_that_was_killed_after_its_training_trains_no_more(job, trained, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(sweep_trial, "finish", raises_system_exit)
        with pytest.raises(SystemExit):
            sweep_trial.sweep_trial(SETTINGS, job=job)
    sweep_trial.sweep_trial(SETTINGS, job=job)
    assert len(trained) == 1
    assert records_of(job)["trained_by"].tolist() == [trial.path.rpartition("/")[2] for trial in trials_of(job)]


def raises_system_exit(*args, **named):
    raise SystemExit


def test_trials_of_the_same_training_at_the_same_time_train_it_once(job, trained, monkeypatch):
    """The second waits for the first, and finds what came of it."""
    leases = Leases()
    monkeypatch.setattr(leases_module.ray, "get", lambda result: result)
    monkeypatch.setattr(leases_module, "_SECONDS_BETWEEN_QUESTIONS", 0.01)
    here = SimpleNamespace(take=SimpleNamespace(remote=leases.take), give_back=SimpleNamespace(remote=leases.give_back))
    monkeypatch.setattr(CountedTrial, "epochs_of_a_training", 1)
    began = threading.Event()
    train = CountedTrial._train

    def slowly(self, *args):
        began.set()
        time.sleep(0.3)
        return train(self, *args)

    monkeypatch.setattr(CountedTrial, "_train", slowly)
    job = replace(job, leases=here)
    first = threading.Thread(target=sweep_trial.sweep_trial, args=(SETTINGS,), kwargs={"job": job})
    first.start()
    began.wait()
    sweep_trial.sweep_trial({"identify.top_k": 6}, job=job)
    first.join()
    assert len(trained) == 1
    assert records_of(job)["trained_by"].nunique() == 1


def test_a_shared_training_reports_every_epoch_that_was_measured(job, trained, told, monkeypatch):
    monkeypatch.setattr(CountedTrial, "epochs_of_a_training", 3)
    job = with_sweep(job, scheduler="asha")
    sweep_trial.sweep_trial(SETTINGS, job=job)
    own = [report["value"] for report in told]
    sweep_trial.sweep_trial({"identify.top_k": 6}, job=job)
    assert len(trained) == 1
    assert [report["value"] for report in told] == own * 2
    assert records_of(job)["epochs"].tolist() == [3, 3]


def test_a_training_is_named_as_the_stage_that_may_take_it_names_it(job, trained):
    job = replace(job, sources={"targets": "t", "seed": 0}, inputs={"validation": "v"})
    sweep_trial.sweep_trial({"identify.top_k": 6, "finetune.epochs": 7}, job=job)
    (inputs,) = trained
    assert inputs == {"masks": MASKS.digest(), "targets": "t", "seed": 0} | training_settings(
        with_settings(job.config, {"finetune.epochs": 7})
    )
    sweep_trial.sweep_trial({"identify.top_k": 6, "finetune.patience": 2}, job=job)
    assert trained[1]["validation"] == "v"
