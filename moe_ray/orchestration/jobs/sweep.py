"""The sweep: Ray Tune over settings; a trial identifies from the one stored capture, trains and measures in one process.

A trial process loads the model once and is reused; nothing is captured. Every trial is a stage with a folder of its own,
so a sweep that was killed, however hard, trains no finished trial again. Each trial also leaves a record for this sweep,
and the ranking is made from those.

Ray Tune keeps its own state as pickles, which may run any code when they are read. So that state is never in the run
directory, which people pass on, and is never read back: an interrupted sweep asks Tune for the same trials again, and those
that are finished give their reports at once, from their JSON records.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from ray import tune
from ray.tune.search import BasicVariantGenerator

from moe_ray.config.auto import gpus_of
from moe_ray.config.io import to_yaml
from moe_ray.config.run import Config
from moe_ray.errors import InputError, MoeRayError, OutsideFailed
from moe_ray.orchestration.cluster.leases import start_leases
from moe_ray.orchestration.cluster.placement import Placement, resources_of_process
from moe_ray.orchestration.cluster.ray_session import require_cpus, require_gpus, resources_released
from moe_ray.orchestration.jobs.sweep_job import SweepJob, plain_settings, read_trials, record_name
from moe_ray.orchestration.jobs.sweep_trial import forget_checkpoints, sweep_trial
from moe_ray.report.format import setting
from moe_ray.run_directory import HEAT_MAP, TRIALS, WINNER
from moe_ray.storage.folder import Folder
from moe_ray.storage.stage import STARTED
from moe_ray.studies.heat_map import draw_heat_map
from moe_ray.studies.heat_map_table import map_of_trials
from moe_ray.studies.kept_training import forget_training
from moe_ray.studies.objective import rank_trials
from moe_ray.studies.search_space import Range, SearchSpace, read_space, winning_config

logger = logging.getLogger(__name__)

_RANGES = {"uniform": tune.uniform, "loguniform": tune.loguniform, "randint": tune.randint}


def sweep(job: SweepJob) -> pd.DataFrame:
    """Runs every trial that was not finished before; returns all trials, the best first.

    Args:
        job: what trials need.

    Raises:
        InputError: no trial could be trained.
    """
    settings = job.config.sweep
    require_cpus(int(settings.max_concurrent_trials * settings.cpus_per_trial), "the sweep")
    require_gpus(settings.max_concurrent_trials * gpus_of(settings.gpus_per_trial), "the sweep")
    space = read_space(job.config)
    total = len(space.grid()) if settings.search == "grid" else settings.num_trials
    # Ray Tune's own tables would be printed beside ours.
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    # Ray Tune would take Ctrl-C for the end of the sweep, and return what it has.
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    logger.info("sweep: %d trials over %s", total, ", ".join(space.settings))
    if settings.max_concurrent_trials > 1:
        job = replace(job, leases=start_leases())
    # Trials give Ray Tune numbers only, so no node but this one needs to reach its folder.
    with tempfile.TemporaryDirectory(prefix="moe-ray-tune-") as state, resources_released("the sweep"):
        results = _tuner(job, state, space, total).fit()
    if results.errors:
        raise _first_error(results.errors)
    ranked = rank_trials(read_trials(job.records))
    if not (ranked["state"] == "finished").any():
        raise InputError(
            f"sweep: none of {len(ranked)} trials could be trained to the end; widen sweep.space. The first says: "
            f"{ranked['message'].iloc[0]}"
        )
    _forget_all_but(job.trials, str(ranked["trained_by"].iloc[0]))
    return ranked


def _forget_all_but(trials: Folder, kept: str) -> None:
    """Removes the learned experts of every trial but one, and all checkpoints; what trials measured stays."""
    for name in trials.names():
        if trials.exists(f"{name}/{STARTED}"):
            forget_checkpoints(trials.sub(name))
            if name != kept:
                forget_training(trials.sub(name))


def _first_error(errors: Sequence[Exception]) -> Exception:
    """What the sweep ends with: one sentence where the outside failed, else the fault with its traceback."""
    cause = getattr(errors[0], "cause", None) or errors[0]
    if isinstance(cause, OutsideFailed):
        return OutsideFailed(
            f"sweep: {len(errors)} trials could not be measured: {cause}; run the same command again, it goes on with "
            "these trials"
        )
    if isinstance(cause, MoeRayError):
        return cause
    fault = RuntimeError(f"{len(errors)} trials failed; the first error is above")
    fault.__cause__ = errors[0]
    return fault


def _tuner(job: SweepJob, state: str, space: SearchSpace, total: int) -> tune.Tuner:
    settings = job.config.sweep
    gpus, placement = gpus_of(settings.gpus_per_trial), Placement.of(job.config.cluster)
    placement.require(gpus, "the sweep")
    resources = {"CPU": settings.cpus_per_trial, **resources_of_process(gpus, job.memory, placement)}
    trainable = tune.with_resources(tune.with_parameters(sweep_trial, job=job), resources)
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
            name="sweep",
            storage_path=state,
            callbacks=[_Lines(total), BestKept(job)],
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
    epochs = [*space.choices.get("finetune.epochs", ()), config.finetune.epochs]
    if "finetune.epochs" in space.ranges:
        epochs.append(int(space.ranges["finetune.epochs"].ends()[1]))
    return tune.schedulers.ASHAScheduler(max_t=max(epochs), grace_period=1, reduction_factor=3)


class _Lines(tune.Callback):  # type: ignore[misc]
    """A line in the log for every trial that ends."""

    def __init__(self, total: int) -> None:
        self.total = total

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        done = sum(other.status == "TERMINATED" or other is trial for other in trials)
        result = trial.last_result
        logger.info(
            "sweep: trial %d of %d: %s: %s", done, self.total, _in_words(trial.config), result.get("message", "")
        )


class BestKept(tune.Callback):  # type: ignore[misc]
    """Keeps the learned experts of the best trials so far only, so that a long sweep does not fill the storage.

    Among equal values the rank decides, when all trials are done.
    """

    def __init__(self, job: SweepJob) -> None:
        self.job = job
        self.best, self.kept = float("-inf"), set[str]()

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Removes the learned experts of the trials that this one leaves behind, or its own."""
        name = record_name(plain_settings(trial.config))
        record = self.job.records.read_json(name) if self.job.records.exists(name) else {}
        trained_by = str(record.get("trained_by", ""))
        if record.get("state") != "finished" or record["value"] < self.best:
            worse = {trained_by} - self.kept - {""}
        elif record["value"] == self.best:
            worse = set()
            self.kept.add(trained_by)
        else:
            worse = self.kept - {trained_by}
            self.best, self.kept = record["value"], {trained_by}
        for folder in worse:
            forget_training(self.job.trials.sub(folder))


def _in_words(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={setting(value)}" for key, value in settings.items())


def write_results(folder: Folder, config: Config, ranked: pd.DataFrame) -> dict[str, Any]:
    """Writes the table, the heat map and the winner's configuration; returns the notes of the stage."""
    space = read_space(config)
    winner = ranked.iloc[0]
    settings = {key: _plain(winner[key]) for key in space.settings}
    folder.write_table(TRIALS, ranked)
    folder.write_bytes(WINNER, to_yaml(winning_config(config, settings)).encode())
    shown = map_of_trials(ranked, space, settings)
    star = (
        f"\n* = forgets more than {config.sweep.max_forgetting:g} nats per token" if shown.over.any(axis=None) else ""
    )
    title = f"{config.sweep.objective} on the validation split (darker is better)\nframe: the winner{star}"
    pictures = draw_heat_map(shown, title=title)
    for kind, data in pictures.items():
        folder.write_bytes(f"{HEAT_MAP}.{kind}", data)
    states = ranked["state"].value_counts()
    return {
        "winner": settings,
        "objective": config.sweep.objective,
        "value": float(winner["objective"]),
        "is_within_bound": bool(winner["is_within_bound"]),
        "trials": len(ranked),
        "trainings": int(ranked.loc[ranked["state"] == "finished", "trained_by"].nunique()),
        "stopped": int(states.get("stopped", 0)),
        "failed": int(states.get("failed", 0)),
        "identify_seconds_max": float(ranked["identify_seconds"].max()),
        "train_seconds": float(ranked["train_seconds"].sum()),
    }


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tolist()
    return value.item() if isinstance(value, np.generic) else value
