"""One trial of a sweep: it identifies from the one stored capture, trains and measures in one process."""

from __future__ import annotations

import os
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any, cast

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
from moe_ray.prompts.example_tables import frame_to_batches, row_to_example
from moe_ray.prompts.quarantine import read_training_examples
from moe_ray.storage.fingerprint import content_hash
from moe_ray.storage.folder import Folder
from moe_ray.studies.measured import Measured
from moe_ray.studies.objective import FAILED, plain_metrics, score
from moe_ray.studies.trial import identify_masks, measurer, run_trial

BASE = "base_metrics.json"

_RECORDS = "trials"


@dataclass(frozen=True, kw_only=True)
class SweepJob:
    """What every trial needs to know; plain values and URLs."""

    model: ModelConfig
    config: Config
    batches_url: str
    routing_url: str
    folder_url: str
    neutral_texts: tuple[str, ...] = ()

    @property
    def records(self) -> Folder:
        """One file per trial."""
        return Folder.open(self.folder_url).sub(_RECORDS)


def sweep_trial(config: dict[str, Any], *, job: SweepJob) -> None:
    """One trial: settings in, reports to Ray Tune and a record out."""
    settings = {key: value.item() if hasattr(value, "item") else value for key, value in config.items()}
    records, name = job.records, f"{content_hash(settings)}.json"
    record = records.read_json(name) if records.exists(name) else {}
    if record.get("state") in ("finished", "failed"):
        for epoch in record["epochs"]:
            tune.report({"value": epoch["value"], "said": f"{epoch['said']} (done before)"})
        return
    trial = _Trial(job, settings, records, name)
    try:
        trial.run()
    except InputError as error:
        tune.report(trial.record("failed", {"value": FAILED, "said": f"could not be trained: {error}"}))


class _Trial:
    """A trial that runs now."""

    def __init__(self, job: SweepJob, settings: dict[str, Any], records: Folder, name: str) -> None:
        self.job, self.settings, self.records, self.name = job, settings, records, name
        self.config = with_settings(job.config, settings)
        prepared = Folder.open(job.batches_url)
        self.batches = frame_to_batches(read_training_examples(prepared, Folder.open(job.routing_url)))
        self.validation = prepared.read_frame("validation.parquet")
        self.about: dict[str, Any] = {"process": os.getpid()}
        # Of the epochs before an interruption; none where the trial is new.
        self.epochs: list[dict[str, Any]] = records.read_json(name)["epochs"] if tune.get_checkpoint() else []

    def run(self) -> None:
        began = time.perf_counter()
        masks = identify_masks(
            stored_counts(Folder.open(self.job.routing_url).sub("counts").url),
            self.config.identify,
            seed=self.config.seed,
        )
        self.about |= {
            "identify_seconds": round(time.perf_counter() - began, 4),
            "union_experts": len(masks.union_experts),
            "masks": masks.digest(),
        }
        base = base_model(self.job.model, self.config.sweep.max_concurrent_trials)
        base.check()
        self.measure = measurer(
            base.model, base.tokenizer, self.validation, self.config.evaluate, self.job.neutral_texts
        )
        self.base_metrics = self._base_metrics()
        rows = self.validation.to_dict("records")
        with ExitStack() as stack:
            checkpoint = tune.get_checkpoint()
            outcome = run_trial(
                base.model,
                base.tokenizer,
                self.batches,
                masks,
                config=self.config.finetune,
                seed=self.config.seed,
                measure=self.measure,
                validation=[row_to_example(cast("dict[str, Any]", row)) for row in rows],
                resume_from=None if checkpoint is None else stack.enter_context(checkpoint.as_directory()),
                after_step=self._after_step if self.config.sweep.scheduler == "asha" else None,
            )
        self.about |= {
            "trainable_parameters": outcome.trainable_parameters,
            "frozen_parameters_changed": outcome.frozen_parameters_changed,
            "train_seconds": round(outcome.train_seconds, 2),
            "evaluate_seconds": round(outcome.evaluate_seconds, 2),
        }
        tune.report(self.record("finished", self._scored(outcome.measured)))

    def _base_metrics(self) -> dict[str, float]:
        """Of the base model on the same examples; measured by the first trial."""
        folder = Folder.open(self.job.folder_url)
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
        said = (
            f"unsafe refused {metrics['unsafe_refusal_rate']:.1%}, safe refused {metrics['safe_refusal_rate']:.1%}, "
            f"forgotten {got.forgetting:+.3f}{bound}; identified in {self.about['identify_seconds']:.2f} s"
        )
        return {**metrics, **asdict(got), "said": said}

    def record(self, state: str, scored: dict[str, Any]) -> dict[str, Any]:
        """Writes what is known so far; returns what Ray Tune is told."""
        self.epochs.append(scored)
        known = {"state": state, "settings": self.settings, **self.about, **scored, "epochs": self.epochs}
        self.records.write_json(self.name, known)
        return {"value": scored["value"], "said": scored["said"]}

    def _after_step(self, trainer: MaskedTrainer, report: StepReport) -> None:
        if trainer.next_step % trainer.steps_per_epoch or trainer.is_finished:
            return
        told = self.record("stopped", self._scored(self.measure()))
        with tempfile.TemporaryDirectory() as folder:
            save_checkpoint(trainer, folder)
            tune.report(told, checkpoint=tune.Checkpoint.from_directory(folder))


def read_trials(records: Folder) -> pd.DataFrame:
    """All trials with a record, one row each: settings by dotted key, then what came of them.

    The column `state` is `finished`, `stopped` (by the scheduler, before its last epoch) or `failed` (`said` tells why).
    """
    rows = []
    for name in records.names():
        if name.endswith(".json") and not name.startswith("."):
            record = records.read_json(name)
            settings, epochs = record.pop("settings"), record.pop("epochs")
            rows.append({**settings, "epochs": len(epochs), **record})
    return pd.DataFrame(rows)
