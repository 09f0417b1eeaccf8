"""One trial of a sweep: it identifies from the one stored capture, trains and measures in one process."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd
from ray import tune

from moe_ray.config.io import with_settings
from moe_ray.config.model import ModelConfig
from moe_ray.config.run import Config
from moe_ray.errors import InputError
from moe_ray.finetuning.checkpoint import save_checkpoint
from moe_ray.finetuning.step_report import StepReport
from moe_ray.finetuning.trainer import MaskedTrainer
from moe_ray.orchestration.cluster.model_process import base_model, stored_counts
from moe_ray.prompts.example_tables import frame_to_batches
from moe_ray.run_directory import SWEEP, RunDirectory
from moe_ray.storage.fingerprint import content_hash
from moe_ray.storage.folder import Folder
from moe_ray.storage.stage import begin, finish
from moe_ray.studies.measured import Measured
from moe_ray.studies.objective import FAILED, plain_metrics, score
from moe_ray.studies.trial import identify_masks, measurer, run_trial

BASE = "base_metrics.json"
_RECORD = "record.json"


@dataclass(frozen=True, kw_only=True)
class SweepJob:
    """What every trial needs to know; plain values.

    Attributes:
        model: the base model.
        config: of the run; a trial's settings go on top.
        run_url: the run directory.
        inputs: everything that all trials depend on, as plain values.
        neutral_texts: whose loss shows what was forgotten.
    """

    model: ModelConfig
    config: Config
    run_url: str
    inputs: Mapping[str, Any]
    neutral_texts: tuple[str, ...] = ()

    @property
    def folder(self) -> Folder:
        """Of the sweep."""
        return Folder.open(self.run_url).sub(SWEEP)

    @property
    def trials(self) -> Folder:
        """One folder per trial."""
        return self.folder.sub("trials")


def sweep_trial(config: dict[str, Any], *, job: SweepJob) -> None:
    """One trial, a stage of its own: settings in, reports to Ray Tune and a record out.

    Settings that cannot be trained are a result. A judge or storage that failed is none, so that trial is run again.
    """
    settings = {key: value.item() if hasattr(value, "item") else value for key, value in config.items()}
    folder = job.trials.sub(content_hash(settings))
    inputs = {"settings": settings, "sweep": content_hash(dict(job.inputs))}
    if begin(folder, inputs).action == "reuse":
        for epoch in folder.read_json(_RECORD)["epochs"]:
            tune.report({"value": epoch["value"], "message": f"{epoch['message']} (done before)"})
        return
    started = time.perf_counter()
    trial = _Trial(job, settings, folder)
    try:
        told = trial.run()
    except InputError as error:
        told = trial.record("failed", {"value": FAILED, "message": f"could not be trained: {error}"})
    finish(folder, inputs, {}, seconds=round(time.perf_counter() - started, 2))
    tune.report(told)


class _Trial:
    """A trial that runs now."""

    def __init__(self, job: SweepJob, settings: dict[str, Any], folder: Folder) -> None:
        self.job, self.settings, self.folder = job, settings, folder
        self.config = with_settings(job.config, settings)
        self.directory = RunDirectory.open(job.run_url)
        self.about: dict[str, Any] = {"process": os.getpid()}
        # Of the epochs before an interruption; none where the trial is new.
        self.epochs: list[dict[str, Any]] = folder.read_json(_RECORD)["epochs"] if tune.get_checkpoint() else []

    def run(self) -> dict[str, Any]:
        """Trains and measures; returns what Ray Tune is told."""
        began = time.perf_counter()
        counts = stored_counts(self.directory.counts_folder.url)
        masks = identify_masks(counts, self.config.identify, seed=self.config.seed)
        self.about |= {
            "identify_seconds": round(time.perf_counter() - began, 4),
            "union_experts": len(masks.union_experts),
            "masks": masks.digest(),
        }
        base = base_model(self.job.model, self.config.sweep.max_concurrent_trials)
        base.check()
        validation = self.directory.validation
        assert validation is not None, "a sweep without validation examples is refused at the start"
        self.measure = measurer(base.model, base.tokenizer, validation, self.config.evaluate, self.job.neutral_texts)
        self.base_metrics = self._base_metrics()
        with ExitStack() as stack:
            checkpoint = tune.get_checkpoint()
            outcome = run_trial(
                base.model,
                base.tokenizer,
                frame_to_batches(self.directory.training_examples),
                masks,
                config=self.config.finetune,
                seed=self.config.seed,
                measure=self.measure,
                validation=self.directory.validation_examples,
                resume_from=None if checkpoint is None else stack.enter_context(checkpoint.as_directory()),
                after_step=self._after_step if self.config.sweep.scheduler == "asha" else None,
            )
        self.about |= {
            "trainable_parameters": outcome.trainable_parameters,
            "frozen_parameters_changed": outcome.frozen_parameters_changed,
            "train_seconds": round(outcome.train_seconds, 2),
            "evaluate_seconds": round(outcome.evaluate_seconds, 2),
        }
        return self.record("finished", self._scored(outcome.measured))

    def _base_metrics(self) -> dict[str, float]:
        """Of the base model on the same examples; measured by the first trial."""
        folder = self.job.folder
        if not folder.exists(BASE):
            measured = self.measure()
            folder.write_json(BASE, plain_metrics(measured.answers, measured.neutral))
        metrics: dict[str, float] = folder.read_json(BASE)
        return metrics

    def _scored(self, measured: Measured) -> dict[str, Any]:
        metrics = plain_metrics(measured.answers, measured.neutral)
        settings = self.config.sweep
        got = score(settings.objective, metrics, self.base_metrics, max_forgetting=settings.max_forgetting)
        bound = "" if got.is_within_bound else f" (over the bound of {settings.max_forgetting:g})"
        message = (
            f"unsafe refused {metrics['unsafe_refusal_rate']:.1%}, safe refused {metrics['safe_refusal_rate']:.1%}, "
            f"forgotten {got.forgetting:+.3f}{bound}; identified in {self.about['identify_seconds']:.2f} s"
        )
        return {**metrics, **asdict(got), "message": message}

    def record(self, state: str, scored: dict[str, Any]) -> dict[str, Any]:
        """Writes what is known so far; returns what Ray Tune is told."""
        self.epochs.append(scored)
        known = {"state": state, "settings": self.settings, **self.about, **scored, "epochs": self.epochs}
        self.folder.write_json(_RECORD, known)
        return {"value": scored["value"], "message": scored["message"]}

    def _after_step(self, trainer: MaskedTrainer, report: StepReport) -> None:
        if trainer.next_step % trainer.steps_per_epoch or trainer.is_finished:
            return
        told = self.record("stopped", self._scored(self.measure()))
        with tempfile.TemporaryDirectory() as folder:
            save_checkpoint(trainer, folder)
            tune.report(told, checkpoint=tune.Checkpoint.from_directory(folder))


def read_trials(trials: Folder) -> pd.DataFrame:
    """All trials with a record, one row each: settings by dotted key, then what came of them.

    The column `state` is `finished`, `stopped` (by the scheduler, before its last epoch) or `failed` (`message` tells why).
    """
    rows = []
    for name in trials.names():
        if trials.exists(f"{name}/{_RECORD}"):
            record = trials.read_json(f"{name}/{_RECORD}")
            settings, epochs = record.pop("settings"), record.pop("epochs")
            rows.append({**settings, "epochs": len(epochs), **record})
    return pd.DataFrame(rows)
