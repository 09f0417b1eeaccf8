"""What of a run goes to MLflow, and when.

The parent run holds what is true of the whole: settings, data sets, versions, results, masks, figures. Each stage that is
worked on has a nested run with what happened meanwhile: its seconds, and of training every step, as it comes. A stage that
is reused gets no run; a tag of the parent names the one that did the work.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from moe_ray.config.io import settings_as_text
from moe_ray.finetuning.history import HISTORY, read_history
from moe_ray.orchestration.tracking.mlflow_run import RECORD, MlflowTracker, Tracker
from moe_ray.prompts.quarantine import QUARANTINE
from moe_ray.report.html.page import REPORT, Report
from moe_ray.storage.fingerprint import environment
from moe_ray.storage.folder import Folder

if TYPE_CHECKING:
    from moe_ray.orchestration.run import Run

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

_COUNTS = ("batches", "union_experts", "trainable_parameters", "total_parameters", "frozen_parameters_changed")

_ARTIFACTS = (
    ("", "config.yaml"),
    ("", "summary.json"),
    ("", REPORT),
    ("routing", QUARANTINE),
    ("unsafe_experts", "masks.npz"),
    ("unsafe_experts", "unsafe_experts.json"),
    ("unsafe_experts", "risk_differences.parquet"),
    ("experts", "adapter.json"),
    ("experts", "experts.safetensors"),
    ("experts", HISTORY),
    ("evaluation_before", "answers.parquet"),
    ("evaluation_after", "answers.parquet"),
)


@contextmanager
def tracked(run: Run) -> Iterator[MlflowTracker]:
    """The run's MLflow run, open; stages of the run are nested under it."""
    name = run.folder.url.rstrip("/").rpartition("/")[2]
    with MlflowTracker(run.config.tracking, name, run.folder, settings=settings_as_text(run.config)) as tracker:
        tracker.log_tags({"model": run.model.path, **_flat(environment())})
        tracker.log_stored(run.folder, "config.yaml")
        run.tracker = tracker
        try:
            yield tracker
        finally:
            run.tracker = None


@contextmanager
def stage_run(parent: Tracker, name: str, folder: Folder) -> Iterator[Tracker]:
    """A nested run for the work on one stage.

    Args:
        parent: the run above.
        name: the stage.
        folder: its folder, which remembers the nested run's id.
    """
    started = time.perf_counter()
    with parent.child(name) as stage:
        folder.write_json(RECORD, {"run_id": stage.run_id})
        with _steps_as_they_come(stage, folder) if name == "experts" else nullcontext():
            yield stage
        stage.log_metrics([(0, {"seconds": time.perf_counter() - started})])


@contextmanager
def _steps_as_they_come(tracker: Tracker, folder: Folder) -> Iterator[None]:
    """Sends each step of a training once, from the history that its first worker keeps writing."""
    sent: set[int] = set()
    ended = threading.Event()

    def look() -> None:
        if not folder.exists(HISTORY):
            return
        steps = [step for step in read_history(folder) if step["step"] not in sent]
        tracker.log_metrics(
            (step["step"], {f"train/{name}": step[name] for name in _STEP_METRICS if name in step}) for step in steps
        )
        sent.update(step["step"] for step in steps)

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


def log_results(tracker: Tracker, run: Run, summary: Mapping[str, Any]) -> None:
    """The run's figures, overall and by batch, and its data sets."""
    for table, context in (("batches.parquet", "training"), ("test.parquet", "evaluation")):
        source = run.folder.sub("batches").url
        tracker.log_dataset(
            run.prepare_frame(table), name=Path(table).stem, source=f"{source}/{table}", context=context
        )
    tracker.log_tags(_where_stages_were_run(run))
    tracker.log_metrics([(0, {name: summary[name] for name in _COUNTS})])
    for step, when in enumerate(("before", "after")):
        figures = _values(summary[when])
        tracker.log_metrics([(step, {f"held_out/{name}": value for name, value in figures.items()})])
        masked = _values(summary[when].get("masked") or {})
        tracker.log_metrics([(step, {f"held_out_masked/{name}": value for name, value in masked.items()})])
    changes = _values(summary.get("change") or {})
    tracker.log_metrics([(0, {f"change/{name}": value for name, value in changes.items()})])
    tracker.log_metrics(_per_batch(summary))


def _per_batch(summary: Mapping[str, Any]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Figures of each batch, with `batch_idx` as the step."""
    for batch, experts in summary["per_batch_unsafe_experts"].items():
        values: dict[str, Any] = {"batch/unsafe_experts": len(experts)}
        for when in ("before", "after"):
            own = _values(summary[when].get("per_batch", {}).get(batch, {}))
            values |= {f"batch/{when}/{name}": value for name, value in own.items()}
        yield int(batch), values


def _values(block: Mapping[str, Any]) -> dict[str, Any]:
    """The plain figures of a block, without their intervals."""
    return {name: item["value"] for name, item in block.items() if isinstance(item, dict) and "value" in item}


def _where_stages_were_run(run: Run) -> dict[str, str]:
    tags = {}
    for name in run.seconds:
        if run.folder.exists(f"{name}/{RECORD}"):
            run_id = run.folder.sub(name).read_json(RECORD)["run_id"]
            tags[f"stage.{name}"] = f"reused from run {run_id}" if name in run.reused else f"run {run_id}"
        elif name in run.reused:
            tags[f"stage.{name}"] = "reused from a run without tracking"
    return tags


def log_trials(tracker: Tracker, trials: pd.DataFrame, settings: Sequence[str], folder: Folder) -> None:
    """A nested run for each trial of a sweep, and the sweep's table, heat map and winner.

    Args:
        tracker: the parent run.
        trials: ranked.
        settings: the columns that were searched.
        folder: of the sweep.
    """
    for place, trial in enumerate(trials.to_dict("records"), start=1):
        known = {str(key): value for key, value in trial.items()}
        with tracker.child(
            f"trial {place}", tags={"state": known["state"], "place": place, "said": known["said"]}
        ) as own:
            own.log_params({key: known[key] for key in settings})
            own.log_metrics([(0, _numbers(known, settings))])
    for name in ("trials.parquet", "heat_map.png", "heat_map.svg", "winner.yaml"):
        tracker.log_stored(folder, name, "sweep")


def log_arms(tracker: Tracker, table: pd.DataFrame, folder: Folder) -> None:
    """A nested run for each arm of the comparison, and its table and verdict."""
    for arm in table.to_dict("records"):
        known = {str(key): value for key, value in arm.items()}
        with tracker.child(f"baseline {known['arm']}") as own:
            own.log_metrics([(0, _numbers(known, ()))])
    for name in ("comparison.parquet", "verdict.json"):
        tracker.log_stored(folder, name, "baselines")


def _numbers(row: Mapping[str, Any], without: Sequence[str]) -> dict[str, Any]:
    return {
        key: float(value)
        for key, value in row.items()
        if key not in without and isinstance(value, (int, float)) and value == value
    }


def log_artifacts(tracker: Tracker, run: Run, made: Report) -> None:
    """Masks, risk tables, adapter, answers, the report and its figures."""
    for stage, name in _ARTIFACTS:
        source = run.folder.sub(stage) if stage else run.folder
        if source.exists(name):
            tracker.log_stored(source, name, stage)
    for name, svg in made.figures.items():
        tracker.log_bytes(f"{name}.svg", svg.encode(), "figures")


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= _flat(item, f"{prefix}{key}.") if isinstance(item, dict) else {f"{prefix}{key}": item}
    return flat
