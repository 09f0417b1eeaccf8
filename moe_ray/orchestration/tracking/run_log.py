"""What of a run goes to MLflow, and when.

The parent run holds what is true of the whole: settings, data sets, versions, results, masks, figures. Each stage that is
worked on has a nested run with what happened meanwhile: its seconds, and of training every step, as it comes. A stage that
is reused gets no run; a tag of the parent names the one that did the work.
"""

from __future__ import annotations

import getpass
import logging
import re
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import pandas as pd
from mlflow.system_metrics import system_metrics_monitor

from moe_ray.config.io import settings_as_text
from moe_ray.config.run import Config
from moe_ray.finetuning.adapter_files import ADAPTER_FILES
from moe_ray.finetuning.history import HISTORY, HistoryReader
from moe_ray.identification.findings import CERTAINTY
from moe_ray.identification.mask_files import MASKS, UNSAFE_EXPERTS
from moe_ray.identification.risk_tables import RiskParts
from moe_ray.orchestration.tracking.mlflow_run import RECORD, MlflowTracker, Tracker
from moe_ray.orchestration.tracking.result_tables import log_tables, result_tables, significant_batches, with_intervals
from moe_ray.prompts.example_tables import BATCHES
from moe_ray.prompts.quarantine import QUARANTINE
from moe_ray.report.before_after import ROUTINGS
from moe_ray.report.html.svg import with_size
from moe_ray.run_directory import (
    ABLATE,
    ABLATION_BATCHES,
    ABLATION_EXPERTS,
    ABLATION_TABLE,
    ANSWERS,
    ATTACK,
    CAPTURE,
    COMPARE,
    COMPARISON,
    CONFIG,
    FINETUNE,
    HEAT_MAP_PICTURES,
    IDENTIFY,
    PROMPTS,
    REPORT,
    RISK,
    SUMMARY,
    SWEEP,
    TEST,
    TRANSFER_TABLE,
    TRIALS,
    VERDICT,
    WHENS,
    WINNER,
    RunDirectory,
    figures_of,
)
from moe_ray.storage.fingerprint import environment
from moe_ray.storage.folder import Folder
from moe_ray.storage.stage import Around, Outcome
from moe_ray.studies.pareto import pareto_front

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_LOOKS = 3.0

_STEP_METRICS = (
    "loss",
    "validation_loss",
    "grad_norm",
    "learning_rate",
    "num_experts",
    "num_tokens",
    "tokens_per_second",
    "batch_idx",
    "epoch",
)

MOST_RISK_BYTES = 256 * 10**6
"""Parts of a risk table become artifacts up to this size of all."""

_COUNTS = ("batches", "union_experts", "trainable_parameters", "total_parameters", "frozen_parameters_changed")

_METRIC_NAME = re.compile(r"[^\w/.: -]")
"""What MLflow does not take in a name."""

_ROWS_DESCRIBED = 10_000
"""Of the batches: as many as MLflow takes a data set's digest of."""

_ARTIFACTS = (
    ("", CONFIG),
    ("", SUMMARY),
    ("", REPORT),
    (CAPTURE, QUARANTINE),
    *((IDENTIFY, name) for name in (MASKS, UNSAFE_EXPERTS, CERTAINTY)),
    *((ABLATE, name) for name in (ABLATION_TABLE, ABLATION_BATCHES, ABLATION_EXPERTS)),
    *((FINETUNE, name) for name in (*ADAPTER_FILES, HISTORY)),
    *((figures_of(when), ANSWERS) for when in WHENS),
    (ATTACK, ANSWERS),
)
"""Folders and files of the run directory."""


@contextmanager
def tracked(config: Config, model: str, directory: RunDirectory) -> Iterator[MlflowTracker]:
    """The run's MLflow run, open.

    Args:
        config: the resolved configuration.
        model: path or name of the model that is really used.
        directory: of the run; its last part names the MLflow run.
    """
    name = directory.folder.url.rstrip("/").rpartition("/")[2]
    with MlflowTracker(config.tracking, name, directory.folder, settings=settings_as_text(config)) as tracker:
        about = environment()
        tracker.log_tags({"model": model, **_flat(about), **_user_and_source(about)})
        tracker.log_stored(directory.folder, CONFIG)
        with system_metrics(tracker) if config.tracking.system_metrics else nullcontext():
            yield tracker


def _user_and_source(about: Mapping[str, Any]) -> dict[str, str]:
    """What MLflow's own columns show, which its client fills in for `mlflow.start_run` only."""
    tags = {"mlflow.source.name": about["command"], "mlflow.source.type": "LOCAL"}
    with suppress(OSError, KeyError):  # a container's user may have no name
        tags["mlflow.user"] = getpass.getuser()
    if about["git_commit"]:
        tags["mlflow.source.git.commit"] = about["git_commit"]
    return tags


@contextmanager
def system_metrics(tracker: MlflowTracker) -> Iterator[None]:
    """Logs processors, memory, disk and network of the driver's machine, and its GPUs, as `system/…` meanwhile.

    A server that does not answer any more ends it with a warning.
    """
    logging.getLogger(system_metrics_monitor.__name__).setLevel(logging.WARNING)
    monitor = system_metrics_monitor.SystemMetricsMonitor(tracker.run_id, tracking_uri=tracker.uri, resume_logging=True)
    monitor.start()
    try:
        yield
    finally:
        monitor.finish()


def stage_runs(parent: Tracker) -> Around:
    """Opens a nested run for the work on a stage."""
    return lambda name, folder: stage_run(parent, name, folder)


@contextmanager
def stage_run(parent: Tracker, name: str, folder: Folder) -> Iterator[Tracker]:
    """A nested run for the work on one stage.

    Args:
        parent: the run above.
        name: the stage.
        folder: its folder, which remembers the nested run's id.
    """
    started = time.perf_counter()
    with parent.child(_run_name(name)) as stage:
        folder.write_json(RECORD, {"run_id": stage.run_id})
        with _steps_as_they_come(stage, folder) if name == FINETUNE else nullcontext():
            yield stage
        stage.log_metrics([(0, {"seconds": time.perf_counter() - started})])


def _run_name(stage: str) -> str:
    """What a stage is called in MLflow: its folder's name, but for the prompts, which have that of the command."""
    return "prepare" if stage == PROMPTS else stage


@contextmanager
def _steps_as_they_come(tracker: Tracker, folder: Folder) -> Iterator[None]:
    """Sends each step of a training once, from the history that its first worker keeps writing."""
    history = HistoryReader(folder)
    ended = threading.Event()

    def look() -> None:
        tracker.log_metrics(
            (step["step"], {f"train/{name}": step[name] for name in _STEP_METRICS if name in step})
            for step in history.new_steps()
        )

    def keep_looking() -> None:
        while not ended.wait(_SECONDS_BETWEEN_LOOKS):
            look()

    watcher = threading.Thread(target=keep_looking, name="training metrics", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()
        look()


def log_results(
    tracker: Tracker, directory: RunDirectory, summary: Mapping[str, Any], *, where: Mapping[str, str]
) -> None:
    """The run's figures with their intervals, tables of them overall, by category and by batch, and its data sets.

    Args:
        tracker: the parent run.
        directory: of the run.
        summary: what `summary.json` holds.
        where: from `where_stages_were_run`.
    """
    prompts = directory.sub(PROMPTS)
    stored = directory.stored_batches
    for frame, file, context, num_rows in (
        (stored.first(_ROWS_DESCRIBED), BATCHES, "training", len(stored)),
        (directory.test, TEST, "evaluation", None),
    ):
        about = {"name": file.partition(".")[0], "source": prompts.file_url(file), "context": context}
        tracker.log_dataset(frame, **about, num_rows=num_rows)
    tracker.log_tags(where)
    tracker.log_metrics([(0, {name: summary[name] for name in _COUNTS})])
    for step, when in enumerate(WHENS):
        figures = with_intervals(summary[when])
        tracker.log_metrics([(step, {f"held_out/{name}": value for name, value in figures.items()})])
        for kind in list(ROUTINGS)[1:]:  # those beside natural routing
            figures = with_intervals(summary[when].get(kind) or {})
            tracker.log_metrics([(step, {f"held_out_{kind}/{name}": value for name, value in figures.items()})])
    changes = with_intervals(summary.get("change") or {})
    tracker.log_metrics([(0, {f"change/{name}": value for name, value in changes.items()})])
    tracker.log_metrics([(0, significant_batches(directory.certainty))])
    log_tables(tracker, result_tables(summary))


def where_stages_were_run(outcomes: Mapping[str, Outcome]) -> dict[str, str]:
    """Tags that name the MLflow run which did the work of each stage."""
    tags = {}
    for name, outcome in outcomes.items():
        if outcome.folder.exists(RECORD):
            run_id = outcome.folder.read_json(RECORD)["run_id"]
            tags[f"stage.{_run_name(name)}"] = f"reused from run {run_id}" if outcome.is_reused else f"run {run_id}"
        elif outcome.is_reused:
            tags[f"stage.{_run_name(name)}"] = "reused from a run without tracking"
    return tags


def log_trials(tracker: Tracker, trials: pd.DataFrame, settings: Sequence[str], folder: Folder) -> None:
    """A nested run for each trial of a sweep, and the sweep's table, heat map and winner.

    Args:
        tracker: the parent run.
        trials: ranked.
        settings: the columns that were searched.
        folder: of the sweep.
    """
    front = pareto_front(trials)
    for rank, (trial, is_on_front) in enumerate(zip(trials.to_dict("records"), front, strict=True), start=1):
        known = {str(key): value for key, value in trial.items()}
        tags = {"state": known["state"], "rank": rank, "message": known["message"], "pareto_front": bool(is_on_front)}
        with tracker.child(f"trial {rank}", tags=tags) as nested:
            nested.log_params({key: known[key] for key in settings})
            nested.log_metrics([(0, _numbers(known, settings))])
    for name in (TRIALS, *HEAT_MAP_PICTURES, WINNER):
        tracker.log_stored(folder, name, SWEEP)


def log_ablation(tracker: Tracker, notes: Mapping[str, Any]) -> None:
    """The verdict of the causal check, its figures for every kind of set, and a table of those of each batch.

    Args:
        tracker: the parent run.
        notes: of the stage's manifest.
    """
    tracker.log_tags({"ablate.verdict": notes["verdict"]})
    for row in notes["table"]:
        name = str(row["set"]).replace(" ", "_")
        figures = {f"ablate/{name}/{key}": value for key, value in _numbers(row, ("set",)).items()}
        tracker.log_metrics([(0, figures)])
    rows = [{"batch_idx": int(batch), **row} for batch, row in notes["per_batch"].items()]
    if rows:
        tracker.log_bytes("batches.json", pd.DataFrame(rows).to_json(orient="split", index=False).encode(), ABLATE)


def log_attacks(tracker: Tracker, notes: Mapping[str, Any]) -> None:
    """The rates of every attack, and by how much it and the repair changed them.

    Args:
        tracker: the parent run.
        notes: of the stage's manifest.
    """
    for name, figures in notes["figures"].items():
        known = {f"attack/{name}/{key}": value for key, value in with_intervals(figures).items()}
        tracker.log_metrics([(0, known)])


def log_harness(tracker: Tracker, notes: Mapping[str, Any]) -> None:
    """Both models' scores on every task and metric, and what changed.

    Args:
        tracker: the parent run.
        notes: of the stage's manifest.
    """
    for row in notes["figures"]:
        name = _METRIC_NAME.sub("_", f"{row['task']}/{row['metric']}")
        tracker.log_metrics([(0, {f"harness/{name}/{key}": value for key, value in with_intervals(row).items()})])


def log_arms(tracker: Tracker, table: pd.DataFrame, folder: Folder) -> None:
    """A nested run for each arm of the comparison, its metrics over the steps, and the tables and the verdict."""
    for name, of_arm in table.groupby("arm", sort=False):
        # Shares that end with the same step, as all of an arm that trains nothing do, are one point.
        points = of_arm.drop_duplicates("steps", keep="last").to_dict("records")
        with tracker.child(f"compare {name}") as nested:
            nested.log_metrics([(point["steps"], _numbers(point, ("steps",))) for point in points])
    for name in (COMPARISON, TRANSFER_TABLE, VERDICT):
        if folder.exists(name):
            tracker.log_stored(folder, name, COMPARE)


def _numbers(row: Mapping[Any, Any], without: Sequence[str]) -> dict[str, Any]:
    return {
        str(key): float(value)
        for key, value in row.items()
        if key not in without and isinstance(value, (int, float)) and value == value
    }


def log_artifacts(tracker: Tracker, folder: Folder, figures: Mapping[str, str], *, note: str = "") -> None:
    """Masks, risk tables, adapter, answers, the report and its figures (SVG text by name), and what it says first.

    Args:
        tracker: the parent run.
        folder: the run directory.
        figures: SVG text by name.
        note: text that MLflow shows above the run; empty = none.
    """
    if note:
        tracker.log_tags({"mlflow.note.content": note})
    for stage, name in _ARTIFACTS:
        source = folder.sub(stage) if stage else folder
        if source.exists(name):
            tracker.log_stored(source, name, stage)
    if folder.exists(f"{IDENTIFY}/{RISK}"):
        parts = RiskParts(folder.sub(f"{IDENTIFY}/{RISK}"))
        # A large run's table is hundreds of times what everything else takes, and stays where it is.
        for name in parts.names if parts.num_bytes <= MOST_RISK_BYTES else ():
            tracker.log_stored(parts.folder, name, f"{IDENTIFY}/{RISK}")
    for name, svg in figures.items():
        tracker.log_bytes(f"{name}.svg", with_size(svg).encode(), "figures")


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= _flat(item, f"{prefix}{key}.") if isinstance(item, dict) else {f"{prefix}{key}": item}
    return flat
