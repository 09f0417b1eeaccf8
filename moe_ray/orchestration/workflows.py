"""What each workflow does with a run: its stages in order, and what it shows of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import pandas as pd

from moe_ray.config.ablate import AblateConfig
from moe_ray.evaluation.verdict_rates import COST
from moe_ray.orchestration.run import Run
from moe_ray.orchestration.tracking import run_log
from moe_ray.orchestration.tracking.logged_model import link_figures
from moe_ray.orchestration.tracking.mlflow_run import MlflowTracker
from moe_ray.orchestration.tracking.registry import register_repaired
from moe_ray.orchestration.tracking.result_tables import with_intervals
from moe_ray.prompts.quarantine import QUARANTINE, without_quarantined
from moe_ray.report.ablation_text import ablation_rows, describe_ablation
from moe_ray.report.attack_text import attack_rows, describe_attacks
from moe_ray.report.certainty_text import describe_certainty
from moe_ray.report.comparison_text import comparison_rows, curve_rows, verdict
from moe_ray.report.controls_text import controls_in_words
from moe_ray.report.harness_text import describe_harness, harness_rows
from moe_ray.report.html.page import Report, write_report
from moe_ray.report.run_text import (
    describe_batches,
    describe_capture,
    describe_lost,
    describe_pair_counts,
    describe_selection,
)
from moe_ray.report.study_text import describe_front, describe_sweep, trial_rows
from moe_ray.report.terminal import artifacts_of, next_commands, print_outcome, print_result, print_table, print_text
from moe_ray.run_directory import CAPTURE, COMPARE, FINETUNE, PAIRS, SUMMARY, TRIALS, RunDirectory
from moe_ray.studies.comparison import share_to_judge
from moe_ray.studies.pareto import BENEFIT, cost_of, pareto_front


def prepare(run: Run) -> None:
    """Prompts to batches and held-out examples."""
    notes = run.prepare().notes
    if PAIRS in run.outcomes:
        print_text("Pairs", describe_pair_counts(run.outcomes[PAIRS].notes))
    stored = run.directory.stored_batches.columns("batch_idx", "label", "category")
    print_text("Batches", describe_batches(stored, notes["test_examples"], notes["left_over"]))


def capture(run: Run) -> None:
    """Everything up to routing counts."""
    prepare(run)
    print_text("Routing", describe_capture(run.capture().notes))


def identify(run: Run) -> None:
    """Everything up to masks."""
    capture(run)
    notes, directory = run.identify().notes, run.directory
    print_text(
        "Unsafe experts",
        describe_selection(directory.risk, directory.masks, directory.num_experts_per_tok, directory.identify_config),
    )
    if notes.get("controls"):
        print_text("Confounds", "\n".join(controls_in_words(notes["controls"], run.config.identify)))
    if notes["batches_without_mask"]:
        print_text("Batches without a mask", describe_lost(notes["batches_without_mask"]))
    quarantined = directory.sub(CAPTURE).read_frame(QUARANTINE)
    examples = without_quarantined(directory.stored_batches.texts(), quarantined)
    print_text("How sure", describe_certainty(directory.lengths, directory.certainty, examples, run.config.identify))


def ablate(run: Run) -> None:
    """Everything up to masks, and whether the selected experts are the cause."""
    identify(run)
    _show_ablation(run.ablate().notes)


def finetune(run: Run) -> None:
    """Everything up to learned experts."""
    identify(run)
    run.finetune()


def evaluate(run: Run) -> None:
    """Everything that `full` does but sweep, baselines, tracking and report."""
    identify(run)
    _repair(run)
    print_outcome(run.summary())


def _repair(run: Run) -> None:
    """Evaluation before, fine-tuning, evaluation after."""
    run.evaluate("before")
    run.finetune()
    run.evaluate("after")


def full(run: Run) -> None:
    """Every stage, tracked in MLflow, with a summary and a report; a sweep first and baselines last where asked for."""
    with ExitStack() as tracking:
        with run.seconds.spent_on("tracking", is_start=True):
            tracker = tracking.enter_context(run_log.tracked(run.config, run.model.path, run.directory))
            run.around = run_log.stage_runs(tracker)
        study: dict[str, Any] = {}
        if run.config.sweep.run:
            run, study["sweep"] = _sweep_first(run, tracker)
        identify(run)
        check = run.affordable_check()
        if check is not None:
            study["ablate"] = _ablate(run, check, tracker)
        _repair(run)
        if run.config.rounds.max_rounds > 1:
            notes = run.outcomes[FINETUNE].notes
            study["rounds"] = {name: notes[name] for name in ("rounds", "kept_round", "stopped_because")}
        if run.config.compare.run:
            study["compare"] = _compare_last(run, tracker)
        if run.config.attack.run:
            study["attack"] = _attack_last(run, tracker)
        if run.config.harness.run:
            study["harness"] = _harness_last(run, tracker)
        summary = run.summary() | study | {"mlflow_run_id": tracker.run_id, "reused_stages": run.reused}
        with run.seconds.spent_on("tracking"):
            run_log.log_results(tracker, run.directory, summary, where=run_log.where_stages_were_run(run.outcomes))
        page = _report(run, summary)
        _account(run, summary)
        with run.seconds.spent_on("tracking"):
            run_log.log_artifacts(tracker, run.directory.folder, page.figures, note=page.lede)
            _log_model(run, tracker, summary)
    artifacts = artifacts_of(run.directory.folder, tracker.uri, tracker.run_id)
    commands = next_commands(run.directory.folder, tracker.uri, tracker.experiment_id, tracker.run_id)

    def show_results() -> None:
        """Once more with what has been spent since, Ray's end included."""
        _account(run, summary)
        print_result(summary, run.reused, artifacts, commands)

    run.at_end.append(show_results)


WORKFLOWS: Mapping[str, Callable[[Run], None]] = {
    "prepare": prepare,
    "capture": capture,
    "identify": identify,
    "ablate": ablate,
    "finetune": finetune,
    "evaluate": evaluate,
    "full": full,
    # These are `full` with the setting on that has their name and `.run`.
    "sweep": full,
    "compare": full,
    "attack": full,
    "harness": full,
}
"""By the name of the command."""


def _account(run: Run, summary: dict[str, Any]) -> None:
    """Writes the summary with where the time went."""
    spent = run.seconds.so_far()
    summary["seconds"] = {name: round(part.total, 2) for name, part in spent.items()}
    summary["start_seconds"] = {name: round(part.start, 2) for name, part in spent.items() if part.start}
    run.directory.folder.write_json(SUMMARY, summary)


def _sweep_first(run: Run, tracker: MlflowTracker) -> tuple[Run, dict[str, Any]]:
    """Capture and sweep; the run with the winner's settings, for the stages after it, and what the summary says of it."""
    capture(run)
    outcome = run.sweep()
    trials, settings = outcome.folder.read_frame(TRIALS), list(outcome.notes["winner"])
    caption = "\n".join([describe_sweep(outcome.notes, outcome.folder.url), describe_front(trials, settings)])
    print_table("Sweep", trial_rows(trials, settings), caption=caption)
    if not outcome.is_reused:
        run_log.log_trials(tracker, trials, settings, outcome.folder)
    columns = [*settings, BENEFIT, COST]
    trials = trials.assign(**{COST: cost_of(trials)})
    front = [{key: trial[key] for key in columns} for trial in _records(trials[pareto_front(trials)])]
    return run.winner(), {**outcome.notes, "pareto_front": front}


def _ablate(run: Run, config: AblateConfig, tracker: MlflowTracker) -> dict[str, Any]:
    """The causal check; what the summary says of it."""
    notes = run.ablate(config).notes
    _show_ablation(notes)
    run_log.log_ablation(tracker, notes)
    return {name: notes[name] for name in ("verdict", "in_words", "table", "per_batch", "forwards", "tokens")}


def _show_ablation(notes: Mapping[str, Any]) -> None:
    if notes["table"]:
        print_table("Is it the cause? (nats per token of the model's own answers)", ablation_rows(notes))
    print_text("Cause", describe_ablation(notes))


def _compare_last(run: Run, tracker: MlflowTracker) -> dict[str, Any]:
    """Per-batch masks against the baselines; what the summary says of it."""
    found = run.compare()
    budget = run.config.compare.budget
    words = verdict(found.arms, found.transfer, budget=budget)
    share, _ = share_to_judge(found.arms)
    title = f"Baselines at equal {budget} (held out, natural routing, after {share:.0%} of the steps)"
    if found.arms["share"].nunique() > 1:
        print_table("Unsafe prompts refused, over the steps", curve_rows(found.arms))
    print_table(title, comparison_rows(found.arms), caption=words)
    run_log.log_arms(tracker, found.arms, run.directory.sub(COMPARE))
    shown = {"verdict": words, "budget": budget, "judged_at": share, "arms": _records(found.arms)}
    return shown if found.transfer is None else shown | {"transfer": _records(found.transfer)}


def _attack_last(run: Run, tracker: MlflowTracker) -> dict[str, Any]:
    """Both models under attack; what the summary says of it."""
    notes = run.attack().notes
    print_table("Still repaired under attack? (held out)", attack_rows(notes), caption=describe_attacks(notes))
    run_log.log_attacks(tracker, notes)
    return {name: notes[name] for name in ("figures", "about", "left_out", "prompts")}


def _harness_last(run: Run, tracker: MlflowTracker) -> dict[str, Any]:
    """Both models on tasks of harnesses; what the summary says of it."""
    notes = run.harness().notes
    print_table("Tasks of harnesses", harness_rows(notes), caption=describe_harness(notes))
    run_log.log_harness(tracker, notes)
    return {name: notes[name] for name in ("figures", "versions")}


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows as plain values, None where nothing was measured."""
    return [
        {str(key): value for key, value in row.items()}
        for row in table.astype(object).where(table.notna(), None).to_dict("records")
    ]


def _report(run: Run, summary: dict[str, Any]) -> Report:
    with run.seconds.spent_on("report"):
        run.directory.folder.write_json(SUMMARY, summary)
        # A directory of its own, since what a reader has read once it keeps.
        return write_report(RunDirectory(run.directory.folder), run.config.report)


def _log_model(run: Run, tracker: MlflowTracker, summary: Mapping[str, Any]) -> None:
    """The repaired model where it is to be registered, and its figures as those of a model."""
    model_id = None
    if run.config.tracking.register:
        found = register_repaired(tracker, run.model, run.directory.sub(FINETUNE), run.config.tracking.register)
        if found is not None:
            tracker.log_tags({"repaired_model": found.uri})
            model_id = found.model_id
    link_figures(tracker, model_id, with_intervals(summary["after"]), base=run.model.path)
