"""The sweep: Ray Tune over settings; a trial identifies from the one stored capture, trains and measures in one process.

A trial process loads the model once and is reused; nothing is captured. What a trial found is written as one record per
settings, so that a sweep that was killed, however hard, trains no finished trial again.
"""

from __future__ import annotations

import logging
import os
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any, cast

import numpy as np
import pandas as pd
from ray import tune
from ray.tune.search import BasicVariantGenerator

from moe_ray.artifacts import Folder, content_hash
from moe_ray.batches import frame_to_batches, row_to_example
from moe_ray.checkpoint import save_checkpoint
from moe_ray.config import Config, ModelConfig
from moe_ray.config_io import to_yaml, with_settings
from moe_ray.errors import InputError
from moe_ray.heat_map import draw_heat_map, map_of_trials
from moe_ray.objective import FAILED, plain_metrics, rank_trials, score
from moe_ray.orchestration.cluster import require_cpus
from moe_ray.orchestration.finetune import arrow_filesystem
from moe_ray.orchestration.trial_process import base_model, stored_counts
from moe_ray.quarantine import read_training_examples
from moe_ray.search_space import Range, SearchSpace, read_space
from moe_ray.training import MaskedTrainer, StepReport
from moe_ray.trial import Measured, identify_masks, measurer, run_trial

logger = logging.getLogger(__name__)

BASE = "base_metrics.json"
_TUNE, _RECORDS = "tune", "trials"
_RANGES = {"uniform": tune.uniform, "loguniform": tune.loguniform, "randint": tune.randint}


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


def sweep(job: SweepJob) -> pd.DataFrame:
    """Runs every trial that has no record yet; returns all trials, the best first.

    Args:
        job: what trials need; its folder holds Ray Tune's state until all trials are done.

    Raises:
        InputError: no trial could be trained.
    """
    settings, folder = job.config.sweep, Folder.open(job.folder_url)
    require_cpus(int(settings.max_concurrent_trials * settings.cpus_per_trial), "the sweep")
    space = read_space(job.config)
    total = len(space.grid()) if settings.search == "grid" else settings.num_trials
    # Ray Tune's own tables would be printed beside ours.
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    logger.info("sweep: %d trials over %s", total, ", ".join(space.settings))
    results = _tuner(job, folder, space, total).fit()
    if results.errors:
        raise RuntimeError(f"{len(results.errors)} trials failed; the first error is above") from results.errors[0]
    folder.fs.rm(f"{folder.path}/{_TUNE}", recursive=True)
    ranked = rank_trials(read_trials(job.records))
    if not (ranked["state"] == "finished").any():
        raise InputError(
            f"sweep: none of {len(ranked)} trials could be trained to the end; widen sweep.space. The first says: "
            f"{ranked['said'].iloc[0]}"
        )
    return ranked


def _tuner(job: SweepJob, folder: Folder, space: SearchSpace, total: int) -> tune.Tuner:
    settings = job.config.sweep
    resources = {"CPU": settings.cpus_per_trial}
    if settings.gpus_per_trial:
        resources["GPU"] = settings.gpus_per_trial
    trainable = tune.with_resources(tune.with_parameters(sweep_trial, job=job), resources)
    path, filesystem = f"{folder.path}/{_TUNE}", arrow_filesystem(folder)
    if tune.Tuner.can_restore(path, storage_filesystem=filesystem):
        logger.info("sweep: going on where an earlier one stopped")
        return tune.Tuner.restore(path, trainable, restart_errored=True, storage_filesystem=filesystem)
    return tune.Tuner(
        trainable,
        param_space=_param_space(space, is_grid=settings.search == "grid"),
        tune_config=tune.TuneConfig(
            metric="value",
            mode="max",
            search_alg=_search(job.config),
            scheduler=_scheduler(job.config, space),
            num_samples=1 if settings.search == "grid" else settings.num_trials,
            max_concurrent_trials=settings.max_concurrent_trials if settings.search == "optuna" else None,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name=_TUNE,
            storage_path=folder.path,
            storage_filesystem=filesystem,
            checkpoint_config=tune.CheckpointConfig(num_to_keep=1),
            callbacks=[_Lines(total)],
            verbose=0,
        ),
    )


def _param_space(space: SearchSpace, *, is_grid: bool) -> dict[str, Any]:
    lists = {key: (tune.grid_search if is_grid else tune.choice)(list(values)) for key, values in space.choices.items()}
    return lists | {key: _domain(span) for key, span in space.ranges.items()}


def _domain(span: Range) -> Any:
    low, high = (int(span.low), int(span.high)) if span.kind == "randint" else (span.low, span.high)
    return _RANGES[span.kind](low, high)


def _search(config: Config) -> Any:
    if config.sweep.search != "optuna":
        return BasicVariantGenerator(random_state=config.seed, max_concurrent=config.sweep.max_concurrent_trials)
    try:
        from ray.tune.search.optuna import OptunaSearch

        return OptunaSearch(seed=config.seed)
    except ImportError as error:
        raise InputError("sweep.search=optuna: the package optuna is not installed; install it") from error


def _scheduler(config: Config, space: SearchSpace) -> Any:
    if config.sweep.scheduler == "none":
        return None
    epochs = [*space.choices.get("train.epochs", ()), config.train.epochs]
    if "train.epochs" in space.ranges:
        epochs.append(int(space.ranges["train.epochs"].ends()[1]))
    return tune.schedulers.ASHAScheduler(max_t=max(epochs), grace_period=1, reduction_factor=3)


class _Lines(tune.Callback):  # type: ignore[misc]
    """A line in the log for every trial that ends."""

    def __init__(self, total: int) -> None:
        self.total = total

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        done = sum(other.status == "TERMINATED" or other is trial for other in trials)
        result = trial.last_result
        logger.info("sweep: trial %d of %d: %s: %s", done, self.total, _in_words(trial.config), result.get("said", ""))


def _in_words(settings: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in settings.items()
    )


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
            self.config.selection,
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
                config=self.config.train,
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


def write_results(folder: Folder, config: Config, ranked: pd.DataFrame) -> dict[str, Any]:
    """Writes the table, the heat map and the winner's configuration; returns the notes of the stage."""
    from moe_ray.orchestration.pipeline import winning_config

    space = read_space(config)
    winner = ranked.iloc[0]
    settings = {key: _plain(winner[key]) for key in space.settings}
    folder.write_table("trials.parquet", ranked)
    folder.write_bytes("winner.yaml", to_yaml(winning_config(config, settings)).encode())
    shown = map_of_trials(ranked, space, settings)
    star = (
        f"\n* = forgets more than {config.sweep.max_forgetting:g} nats per token" if shown.over.any(axis=None) else ""
    )
    title = f"{config.sweep.objective} on the validation split (darker is better)\nframe: the winner{star}"
    pictures = draw_heat_map(shown, title=title)
    for kind, data in pictures.items():
        folder.write_bytes(f"heat_map.{kind}", data)
    states = ranked["state"].value_counts()
    return {
        "winner": settings,
        "objective": config.sweep.objective,
        "value": float(winner["objective"]),
        "is_within_bound": bool(winner["is_within_bound"]),
        "trials": len(ranked),
        "stopped": int(states.get("stopped", 0)),
        "failed": int(states.get("failed", 0)),
        "identify_seconds_max": float(ranked["identify_seconds"].max()),
        "train_seconds": float(ranked["train_seconds"].sum()),
    }


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tolist()
    return value.item() if isinstance(value, np.generic) else value
