"""What each workflow does with a run: its stages in order, and what it shows of them."""

from __future__ import annotations

import logging
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_ray import report
from moe_ray.artifacts import environment
from moe_ray.quarantine import describe_capture, describe_lost

if TYPE_CHECKING:
    from moe_ray.orchestration.pipeline import Run

logger = logging.getLogger(__name__)

_ARTIFACTS = (
    ("", "config.yaml"),
    ("", "summary.json"),
    ("routing", "quarantine.parquet"),
    ("unsafe_experts", "masks.npz"),
    ("unsafe_experts", "unsafe_experts.json"),
    ("unsafe_experts", "risk_differences.parquet"),
    ("experts", "adapter.json"),
    ("experts", "experts.safetensors"),
    ("experts", "history.jsonl"),
    ("evaluation_before", "answers.parquet"),
    ("evaluation_after", "answers.parquet"),
)


def run_capture(run: Run) -> None:
    """Batches and routing counts."""
    notes = run.prepare().notes()
    _show(
        "Batches",
        report.describe_batches(run.prepare_frame("batches.parquet"), notes["test_examples"], notes["left_over"]),
    )
    _show("Routing", describe_capture(run.capture().notes()))


def run_identify(run: Run) -> None:
    """Everything up to masks."""
    run_capture(run)
    folder = run.identify()
    risk = folder.read_frame("risk_differences.parquet")
    _show("Unsafe experts", report.describe_selection(risk, run.masks, run.num_experts_per_tok))
    if folder.notes()["batches_without_mask"]:
        _show("Batches without a mask", describe_lost(folder.notes()["batches_without_mask"]))
    examples = run.captured_examples
    _show("How sure", report.describe_certainty(run.lengths(), risk, run.masks, examples, run.config.selection))


def run_finetune(run: Run) -> None:
    """Everything up to learned experts."""
    run_identify(run)
    run.finetune()


def run_evaluate(run: Run) -> None:
    """Everything that `run_all` does but tracking."""
    run_identify(run)
    run.evaluate("before")
    run.finetune()
    run.evaluate("after")
    _show("Result", report.describe_outcome(run.summary()))


def run_all(run: Run) -> None:
    """Every stage, tracked in MLflow, with a summary."""
    started = time.perf_counter()
    from moe_ray.orchestration.pipeline import settings_as_text
    from moe_ray.orchestration.tracking import MlflowTracker

    tracker = MlflowTracker(run.config.tracking, Path(run.config.run_dir).name, run.folder)
    run.seconds["tracking"] = round(time.perf_counter() - started, 2)
    try:
        tracker.log_params(settings_as_text(run.config))
        tracker.log_tags({"model": run.model.path, **_flat(environment())})
        run_evaluate(run)
        summary = run.summary() | {"mlflow_run_id": tracker.run_id, "reused_stages": run.reused}
        before_tracking = time.perf_counter()
        _track(run, tracker, summary)
        run.seconds["tracking"] += round(time.perf_counter() - before_tracking, 2)
        setup = run.seconds["start"] + run.seconds["ray"]
        total = round(setup + time.perf_counter() - started, 2)
        summary["seconds"] = {**run.seconds, "total": total}
        run.folder.write_json("summary.json", summary)
        _log_artifacts(run, tracker)
    except BaseException:
        tracker.end("FAILED")
        raise
    tracker.end()
    _show("Seconds", report.describe_seconds(summary["seconds"], run.reused))
    logger.info("summary: %s", f"{run.folder.url}/summary.json")


def _track(run: Run, tracker: Any, summary: dict[str, Any]) -> None:
    from moe_ray.orchestration.finetune import read_history

    steps = read_history(run.folder.sub("experts"))
    names = ("loss", "num_experts", "num_tokens", "grad_norm", "tokens_per_second", "batch_idx", "epoch")
    tracker.log_metrics((step["step"], {f"train/{name}": step[name] for name in names}) for step in steps)
    for when in (0, 1):
        metrics = summary["before" if when == 0 else "after"]
        tracker.log_metrics([(when, {f"held_out/{name}": value["value"] for name, value in metrics.items()})])
    counts = ("batches", "union_experts", "trainable_parameters", "total_parameters", "frozen_parameters_changed")
    tracker.log_metrics([(0, {name: summary[name] for name in counts})])
    per_batch = summary["per_batch_unsafe_experts"]
    tracker.log_metrics((int(batch), {"unsafe_experts": len(experts)}) for batch, experts in per_batch.items())


def _log_artifacts(run: Run, tracker: Any) -> None:
    with tempfile.TemporaryDirectory() as local:
        for stage, name in _ARTIFACTS:
            source = run.folder.sub(stage) if stage else run.folder
            path = Path(local, name)
            path.write_bytes(source.read_bytes(name))
            tracker.log_file(str(path), stage)


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= _flat(item, f"{prefix}{key}.") if isinstance(item, dict) else {f"{prefix}{key}": item}
    return flat


def _show(title: str, text: str) -> None:
    print(f"\n== {title} ==\n{text}", flush=True)  # noqa: T201
