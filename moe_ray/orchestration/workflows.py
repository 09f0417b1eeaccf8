"""What each workflow does with a run: its stages in order, and what it shows of them."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from moe_ray.report.certainty_text import describe_certainty
from moe_ray.report.run_text import (
    describe_batches,
    describe_capture,
    describe_lost,
    describe_outcome,
    describe_selection,
)
from moe_ray.report.study_text import comparison_rows, describe_sweep, trial_rows, verdict
from moe_ray.report.terminal import artifacts_of, print_result, print_table

if TYPE_CHECKING:
    from moe_ray.orchestration.run import Run
    from moe_ray.orchestration.tracking.mlflow_run import MlflowTracker
    from moe_ray.report.html.page import Report


def run_capture(run: Run) -> None:
    """Batches and routing counts."""
    notes = run.prepare().notes()
    _show(
        "Batches",
        describe_batches(run.prepare_frame("batches.parquet"), notes["test_examples"], notes["left_over"]),
    )
    _show("Routing", describe_capture(run.capture().notes()))


def run_identify(run: Run) -> None:
    """Everything up to masks."""
    run_capture(run)
    folder = run.identify()
    risk = folder.read_frame("risk_differences.parquet")
    _show("Unsafe experts", describe_selection(risk, run.masks, run.num_experts_per_tok))
    if folder.notes()["batches_without_mask"]:
        _show("Batches without a mask", describe_lost(folder.notes()["batches_without_mask"]))
    examples = run.captured_examples
    _show("How sure", describe_certainty(run.lengths(), risk, run.masks, examples, run.config.identify))


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
    _show("Result", describe_outcome(run.summary()))


def run_all(run: Run) -> None:
    """Every stage, tracked in MLflow, with a summary and a report."""
    started = time.perf_counter()
    from moe_ray.orchestration.tracking import run_log as tracked_run

    with tracked_run.tracked(run) as tracker:
        run.seconds["tracking"] = round(time.perf_counter() - started, 2)
        study: dict[str, Any] = {}
        if run.config.sweep.run:
            run, study["sweep"] = _sweep_first(run)
        run_evaluate(run)
        if run.config.rounds.max_rounds > 1:
            notes = run.folder.sub("experts").notes()
            study["rounds"] = {name: notes[name] for name in ("rounds", "kept_round", "stopped_because")}
        if run.config.compare.run:
            study["baselines"] = _hold_against_baselines(run)
        before_tracking = time.perf_counter()
        summary = run.summary() | study | {"mlflow_run_id": tracker.run_id, "reused_stages": run.reused}
        tracked_run.log_results(tracker, run, summary)
        run.seconds["tracking"] += round(time.perf_counter() - before_tracking, 2)
        made = _report(run, summary)
        setup = run.seconds["start"] + run.seconds["ray"]
        summary["seconds"] = {**run.seconds, "total": round(setup + time.perf_counter() - started, 2)}
        run.folder.write_json("summary.json", summary)
        tracked_run.log_artifacts(tracker, run, made)
        if run.config.tracking.register:
            _register(run, tracker)
    print_result(summary, run.reused, artifacts_of(run.folder, tracker.uri, tracker.run_id))


def run_sweep(run: Run) -> None:
    """A sweep, and every stage with the winner's settings, which are scored on the test split here and only here."""
    run_all(run)


def run_compare(run: Run) -> None:
    """Every stage, and the baselines."""
    run_all(run)


def _sweep_first(run: Run) -> tuple[Run, dict[str, Any]]:
    """Capture and sweep; the run with the winner's settings, for the stages after it, and what the summary says of it."""
    from moe_ray.orchestration.tracking.run_log import log_trials

    run_capture(run)
    folder = run.sweep()
    notes, trials = folder.notes(), folder.read_frame("trials.parquet")
    print_table("Sweep", trial_rows(trials, list(notes["winner"])), caption=describe_sweep(notes, folder.url))
    if run.tracker is not None and "sweep" not in run.reused:
        log_trials(run.tracker, trials, list(notes["winner"]), folder)
    return run.winner(), notes


def _hold_against_baselines(run: Run) -> dict[str, Any]:
    """Per-batch masks against the baselines; what the summary says of it."""
    from moe_ray.orchestration.tracking.run_log import log_arms

    table = run.compare()
    words = verdict(table)
    print_table("Baselines at equal budget (held out, natural routing)", comparison_rows(table), caption=words)
    if run.tracker is not None:
        log_arms(run.tracker, table, run.folder.sub("baselines"))
    return {"verdict": words, "arms": table.astype(object).where(table.notna(), None).to_dict("records")}


def _report(run: Run, summary: dict[str, Any]) -> Report:
    from moe_ray.report.html.page import write_report
    from moe_ray.run_directory import FinishedRun

    started = time.perf_counter()
    run.folder.write_json("summary.json", summary)
    made = write_report(FinishedRun.open(run.folder.url), run.config.report)
    run.seconds["report"] = round(time.perf_counter() - started, 2)
    return made


def _register(run: Run, tracker: MlflowTracker) -> None:
    from moe_ray.orchestration.tracking.registry import register_repaired

    uri = register_repaired(tracker, run.model, run.folder.sub("experts"), run.config.tracking.register)
    if uri is not None:
        tracker.log_tags({"repaired_model": uri})


def _show(title: str, text: str) -> None:
    print(f"\n== {title} ==\n{text}", flush=True)  # noqa: T201
