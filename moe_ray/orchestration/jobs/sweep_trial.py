"""One trial of a sweep, a stage of its own: it identifies from the one stored capture, trains and measures in one process.

What a trial measured stays when the sweep changes: another search space, objective or bound trains no finished trial again.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import cached_property, partial
from typing import Any

from ray import tune

from moe_ray.config.effects import settings_affecting
from moe_ray.config.io import with_settings
from moe_ray.errors import NothingSelected, NotTrainable
from moe_ray.evaluation.verdict_rates import COST
from moe_ray.experts import ExpertMasks
from moe_ray.finetuning.checkpoint import steps_done
from moe_ray.finetuning.step_report import StepReport
from moe_ray.finetuning.trainer import MaskedTrainer
from moe_ray.finetuning.training_batches import TrainingBatches
from moe_ray.orchestration.cluster.leases import leased
from moe_ray.orchestration.cluster.model_process import BaseModel, base_model
from moe_ray.orchestration.cluster.node_share import processes_on_this_node
from moe_ray.orchestration.jobs.sweep_job import SweepJob, plain_settings, record_name
from moe_ray.orchestration.jobs.training_checkpoints import CHECKPOINTS, StoredCheckpoints
from moe_ray.run_directory import CAPTURE, PROMPTS, RunDirectory
from moe_ray.storage.fingerprint import content_hash
from moe_ray.storage.folder import Folder
from moe_ray.storage.stage import begin, finish
from moe_ray.studies.kept_training import FILES_OF_TRAINING, keep_training, training_settings
from moe_ray.studies.measured import Measured
from moe_ray.studies.objective import FAILED, plain_metrics, score
from moe_ray.studies.trial import identify_stored_masks, in_one_process, measurer, only_what_selects, run_trial

_RECORD = "record.json"


def sweep_trial(config: dict[str, Any], *, job: SweepJob) -> None:
    """One trial: settings in, reports to Ray Tune and a record out.

    A trial that was finished before, by this sweep or an earlier one, is not trained again.
    """
    trial = Trial(job, plain_settings(config))
    inputs = trial.inputs()
    folder = job.trials.sub(content_hash(inputs))
    decision = begin(folder, inputs, may_go=FILES_OF_TRAINING)
    if decision.action == "reuse":
        for report in trial.recall(folder):
            tune.report(report)
        return
    started = time.perf_counter()
    report = trial.run(folder, resumes=decision.action == "resume")
    finish(folder, inputs, {}, seconds=round(time.perf_counter() - started, 2))
    tune.report(report)


class Trial:
    """A trial of a sweep.

    Args:
        job: of the sweep.
        settings: by dotted key.
    """

    def __init__(self, job: SweepJob, settings: dict[str, Any]) -> None:
        self.job, self.settings = job, settings
        self.config = with_settings(job.config, settings)
        self.directory = RunDirectory.open(job.run_url)
        self.about: dict[str, Any] = {"process": os.getpid()}
        self.epochs: list[dict[str, Any]] = []

    def inputs(self) -> dict[str, Any]:
        """What the trial's measurements depend on; not the objective, which only ranks them."""
        config = self.config
        effective = replace(
            config, identify=only_what_selects(config.identify), finetune=in_one_process(config.finetune)
        )
        settings = settings_affecting(effective, "masks", "weights")
        chosen = {key: value for key, value in settings.items() if key.startswith(("identify.", "finetune."))}
        # Under a scheduler a trial has a measurement of every epoch, otherwise of the last one only.
        return {**self.job.inputs, **chosen, "sweep.scheduler": config.sweep.scheduler}

    def run(self, folder: Folder, *, resumes: bool = False) -> dict[str, Any]:
        """Trains and measures; returns what Ray Tune is told.

        A trial that was interrupted tells Tune of its epochs again, and goes on from its checkpoint. Settings that select
        no expert or cannot be trained are a result. Every other error says nothing about the settings, so it leaves no
        record, and the trial is run again by the next sweep.

        Raises:
            OutsideFailed: a judge or storage failed.
            InputError: the model cannot be loaded, or the judge refused the call.
        """
        self._base_metrics()
        if resumes:
            self._recall_epochs(folder)
        try:
            return self._record(folder, "finished", self._scored(self._train_and_measure(folder)))
        except (NothingSelected, NotTrainable) as error:
            message = f"could not be trained: {error}"
            return self._record(folder, "failed", {"value": FAILED, "message": message})

    def recall(self, folder: Folder) -> list[dict[str, Any]]:
        """What Ray Tune is told of a trial that was finished before, scored as this sweep scores.

        Its own folder stays as it is: what it holds is finished, and a kill in the middle must not cut it short.
        """
        stored = folder.read_json(_RECORD)
        self.about = {"trained_by": _name_of(folder)} | {name: stored[name] for name in _ABOUT if name in stored}
        reports = []
        for epoch in stored["epochs"]:
            scored = epoch if stored["state"] == "failed" else self._scored(epoch["metrics"])
            self._record_for_this_sweep(stored["state"], scored)
            reports.append({"value": scored["value"], "message": f"{scored['message']} (done before)"})
        return reports

    def _recall_epochs(self, folder: Folder) -> None:
        """Tells Ray Tune of the epochs that the checkpoint of an interrupted trial holds, scored as this sweep scores."""
        with StoredCheckpoints(folder.sub(CHECKPOINTS)).latest() as checkpoint:
            steps = 0 if checkpoint is None else steps_done(checkpoint)
        if not steps or not folder.exists(_RECORD):
            return
        stored = folder.read_json(_RECORD)
        self.about |= {name: stored[name] for name in _ABOUT if name in stored}
        for epoch in stored["epochs"]:
            # The last one was recorded before its checkpoint was whole, and is trained and measured again.
            if epoch["steps"] <= steps:
                tune.report(self._record(folder, "stopped", self._scored(epoch["metrics"]) | {"steps": epoch["steps"]}))

    def _train_and_measure(self, folder: Folder) -> dict[str, float]:
        began = time.perf_counter()
        masks = identify_stored_masks(self.directory.counts_folder, self.config.identify, seed=self.config.seed)
        self.about |= {
            "identify_seconds": round(time.perf_counter() - began, 4),
            "union_experts": len(masks.union_experts),
            "masks": masks.digest(),
        }
        learned = self.training_inputs(masks)
        # Under a scheduler a training is measured after every epoch.
        same = f"trained-{content_hash([learned, dict(self.job.inputs), self.config.sweep.scheduler])}.json"
        with leased(self.job.leases, same, _name_of(folder)):
            return self._trained_before(folder, same) or self._train_for_all(folder, masks, learned, same)

    def training_inputs(self, masks: ExpertMasks) -> dict[str, Any]:
        """What the trial's learned experts depend on, as the `finetune` stage of a run with its settings names it."""
        inputs = {"masks": masks.digest(), **self.job.sources, **training_settings(self.config)}
        return inputs | ({"validation": self.job.inputs["validation"]} if self.config.finetune.patience else {})

    def _trained_before(self, folder: Folder, same: str) -> dict[str, float] | None:
        """What a trial with the same masks and training settings measured; None where there is none.

        Trials with different settings often select the same experts: a threshold does nothing where `top_k` binds.
        """
        if not self.job.trials.exists(same):
            return None
        stored = self.job.trials.read_json(same)
        self.about |= {**stored["about"], "train_seconds": 0.0, "evaluate_seconds": 0.0}
        before: list[dict[str, float]] = stored["metrics"]
        last = before.pop()
        for metrics in before[len(self.epochs) :]:
            tune.report(self._record(folder, "stopped", self._scored(metrics)))
        return last

    def _train_for_all(
        self, folder: Folder, masks: ExpertMasks, learned: Mapping[str, Any], same: str
    ) -> dict[str, float]:
        """Trains and measures, and leaves what came of it for trials that would do the same."""
        metrics = self._train(folder, masks, learned)
        self.about["trained_by"] = _name_of(folder)
        about = {name: self.about[name] for name in _ABOUT_A_TRAINING}
        every = [*(epoch["metrics"] for epoch in self.epochs), metrics]
        self.job.trials.write_json(same, {"about": about, "metrics": every})
        return metrics

    def _train(self, folder: Folder, masks: ExpertMasks, learned: Mapping[str, Any]) -> dict[str, float]:
        self.base.check()

        def after_step(trainer: MaskedTrainer, report: StepReport) -> None:
            self._after_step(folder, trainer)

        with StoredCheckpoints(folder.sub(CHECKPOINTS)).latest() as checkpoint:
            outcome = run_trial(
                self.base.model,
                self.base.tokenizer,
                # From where the `finetune` stage reads them, so that the order of the steps is the same too.
                TrainingBatches(self.directory.sub(PROMPTS), self.directory.sub(CAPTURE)),
                masks,
                config=self.config.finetune,
                seed=self.config.seed,
                measure=self.measure,
                validation=self.directory.validation_examples,
                resume_from=checkpoint,
                after_step=after_step if self.config.sweep.scheduler == "asha" else None,
                base=self.job.model.path,
                keep=partial(keep_training, folder, learned),
            )
        forget_checkpoints(folder)
        self.about |= {
            "trainable_parameters": outcome.trainable_parameters,
            "frozen_parameters_changed": outcome.frozen_parameters_changed,
            "train_seconds": round(outcome.train_seconds, 2),
            "evaluate_seconds": round(outcome.evaluate_seconds, 2),
        }
        return plain_metrics(outcome.measured.answers, outcome.measured.neutral)

    def _after_step(self, folder: Folder, trainer: MaskedTrainer) -> None:
        if trainer.next_step % trainer.steps_per_epoch or trainer.is_finished:
            return
        measured = self.measure()
        scored = self._scored(plain_metrics(measured.answers, measured.neutral)) | {"steps": trainer.next_step}
        report = self._record(folder, "stopped", scored)
        StoredCheckpoints(folder.sub(CHECKPOINTS)).save(trainer)
        tune.report(report)

    @cached_property
    def base(self) -> BaseModel:
        """The base model of this process."""
        return base_model(self.job.model, processes_on_this_node(self.config.sweep.max_concurrent_trials))

    def measure(self) -> Measured:
        """Measures the model as it is now, on the validation examples."""
        validation = self.directory.validation
        assert validation is not None, "a sweep without validation examples is refused at the start"
        return measurer(
            self.base.model, self.base.tokenizer, validation, self.config.evaluate, self.job.neutral_texts
        )()

    def _base_metrics(self) -> dict[str, float]:
        """Of the base model on the same examples; measured by the first trial."""
        name = f"base-{content_hash(dict(self.job.inputs))}.json"
        if not self.job.trials.exists(name):
            measured = self.measure()
            self.job.trials.write_json(name, plain_metrics(measured.answers, measured.neutral))
        metrics: dict[str, float] = self.job.trials.read_json(name)
        return metrics

    def _scored(self, metrics: dict[str, float]) -> dict[str, Any]:
        settings = self.config.sweep
        got = score(settings.objective, metrics, self._base_metrics(), max_forgetting=settings.max_forgetting)
        bound = "" if got.is_within_bound else f" (over the bound of {settings.max_forgetting:g})"
        message = (
            f"unsafe refused {metrics['unsafe_refusal_rate']:.1%}, safe refused or degenerate {metrics[COST]:.1%}, "
            f"forgotten {got.forgetting:+.3f}{bound}; identified in {self.about['identify_seconds']:.2f} s"
        )
        return {**metrics, **asdict(got), "message": message, "metrics": metrics}

    def _record(self, folder: Folder, state: str, scored: dict[str, Any]) -> dict[str, Any]:
        """Writes what is known so far, for this sweep and for later ones; returns what Ray Tune is told."""
        folder.write_json(_RECORD, self._record_for_this_sweep(state, scored))
        return {"value": scored["value"], "message": scored["message"]}

    def _record_for_this_sweep(self, state: str, scored: dict[str, Any]) -> dict[str, Any]:
        self.epochs.append(scored)
        known = {"state": state, "settings": self.settings, **self.about, **scored, "epochs": self.epochs}
        self.job.records.write_json(record_name(self.settings), known)
        return known


_ABOUT_A_TRAINING = ("trained_by", "trainable_parameters", "frozen_parameters_changed")
_ABOUT = (
    *("process", "identify_seconds", "union_experts", "masks"),
    *(*_ABOUT_A_TRAINING, "train_seconds", "evaluate_seconds"),
)


def forget_checkpoints(folder: Folder) -> None:
    """Removes what a trial would go on from, if it was interrupted or stopped."""
    StoredCheckpoints(folder.sub(CHECKPOINTS)).delete()


def _name_of(folder: Folder) -> str:
    """A trial's name: that of its folder."""
    return str(folder.path.rpartition("/")[2])
