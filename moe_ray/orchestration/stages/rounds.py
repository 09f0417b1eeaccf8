"""Rounds of fine-tuning: each a stage of its own, in the folder of the learned experts.

A round starts from the experts that the one before it learned. Every round writes one adapter, relative to the original base
model, and the run keeps the adapter of the best round.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pandas as pd

from moe_ray.config.auto import gpus_of
from moe_ray.config.run import Config
from moe_ray.config.scores import needed_scores, needs_weights
from moe_ray.errors import NothingSelected
from moe_ray.experts import ExpertMasks
from moe_ray.finetuning.adapter_files import adapter_digest, copy_adapter
from moe_ray.finetuning.history import read_history, write_history
from moe_ray.identification.mask_files import read_masks, write_masks
from moe_ray.orchestration.cluster.model_actor import ModelWork
from moe_ray.orchestration.jobs.finetune import FinetuneJob, finetune
from moe_ray.orchestration.stages.answering import answered, judged
from moe_ray.orchestration.stages.capture import capture_inputs
from moe_ray.orchestration.stages.context import Context
from moe_ray.orchestration.stages.training import train
from moe_ray.prompts.example_tables import frame_to_batches
from moe_ray.report.study_text import describe_round
from moe_ray.routing.capture_batches import capture_batches
from moe_ray.routing.count_tables import counts_to_table, table_to_counts
from moe_ray.routing.counts import RoutingCounts
from moe_ray.run_directory import ANSWERS, FINETUNE, PARTS, PROMPTS, VERDICTS, round_folder
from moe_ray.storage.folder import Folder
from moe_ray.storage.stage import MADE, Outcome, Stage, run_stage
from moe_ray.studies.rounds import (
    RoundReport,
    best_round,
    exchanged_masks,
    raised_weights,
    report_round,
    stop_reason,
)
from moe_ray.studies.trial import identify_masks

logger = logging.getLogger(__name__)

_VALIDATION, _ROUTING = "validation", "routing"
"""Folders of a round."""
_COUNTS = "counts.parquet"


@dataclass(frozen=True, kw_only=True)
class _State:
    """What a round starts from.

    Attributes:
        masks: that the batches train under.
        weights: by `batch_idx`, of the batches whose weight is not 1.
        before: the round whose learned experts are the start; None = the base model.
    """

    masks: ExpertMasks
    weights: Mapping[int, float] = field(default_factory=dict)
    before: Outcome | None = None

    def inputs(self) -> dict[str, Any]:
        """The state as inputs of the round's stage."""
        return {
            "masks": self.masks.digest(),
            "weights": {str(batch_idx): weight for batch_idx, weight in self.weights.items()},
            "start": "" if self.before is None else self.before.made("experts"),
        }


class Rounds:
    """The rounds of one run.

    Args:
        job: of the first round.
        run: the run.
        inputs: everything that all rounds depend on.
    """

    def __init__(self, job: FinetuneJob, run: Context, inputs: Mapping[str, Any]) -> None:
        self.job, self.run_context, self.inputs = job, run, inputs
        self.config = run.config
        self.batches = run.directory.training_examples
        self.categories = {batch.batch_idx: batch.category for batch in frame_to_batches(self.batches)}

    def run(self) -> dict[str, Any]:
        """Runs or reuses rounds until there is a reason to stop.

        Returns:
            the notes of the round that is kept, with `rounds` (what every round reached), `kept_round` and
            `stopped_because`.
        """
        state = _State(masks=self.run_context.directory.masks)
        reports: list[RoundReport] = []
        outcomes: list[Outcome] = []
        while True:
            number = len(reports) + 1
            outcomes.append(self._round(number, state))
            answers = self._validation_answers(number, outcomes[-1])
            reports.append(report_round(number, answers, self.categories, self.config.rounds.target))
            logger.info("%s", describe_round(reports[-1], len(self.categories)))
            reason = stop_reason(reports, self.config.rounds)
            if reason:
                break
            state = self._next(state, reports[-1], outcomes[-1])
        best = best_round(reports)
        logger.info("rounds: stopped, because %s; the experts of round %d are kept", reason, best.round)
        self._keep([outcome.folder for outcome in outcomes[: best.round]])
        kept = {name: value for name, value in outcomes[best.round - 1].notes.items() if name not in (MADE, "seconds")}
        return kept | {
            "rounds": [report.as_dict() for report in reports],
            "kept_round": best.round,
            "stopped_because": reason,
        }

    def _round(self, number: int, state: _State) -> Outcome:
        """A round's training, done now or by an earlier run."""
        name = round_folder(number)

        def work(folder: Folder) -> dict[str, Any]:
            write_masks(folder, state.masks)
            job = replace(
                self.job,
                out=name,
                masks=name,
                start="" if number == 1 else round_folder(number - 1),
                batch_weights=dict(state.weights),
                seed=self.job.seed + number - 1,
            )
            if number == 1:
                notes = train(self.run_context, job, {"masks": state.masks.digest(), **self.inputs})
            else:
                notes = finetune(job, self.run_context.models)
            return {**notes, MADE: {"experts": adapter_digest(folder)}}

        inputs = {**self.inputs, **state.inputs(), "round": number}
        stage = Stage(name=name, inputs=inputs, work=work, keeps=(_VALIDATION, _ROUTING))
        return run_stage(stage, self.run_context.directory.folder)

    def _validation_answers(self, number: int, outcome: Outcome) -> pd.DataFrame:
        """Judged answers to the validation examples, by the model with the experts that a round learned; a stage."""
        run, name = self.run_context, f"{round_folder(number)}/{_VALIDATION}"
        validation = run.directory.validation
        assert validation is not None, "rounds without validation examples are refused at the start"

        def work(folder: Folder) -> dict[str, Any]:
            answers = answered(run, validation, f"{name}/{PARTS}", "answers, validation", adapter=round_folder(number))
            folder.write_table(ANSWERS, judged(run, answers, folder.sub(VERDICTS), "verdicts, validation"))
            return {"answers": len(answers)}

        inputs = {
            "experts": outcome.made("experts"),
            "validation": run.made(PROMPTS, "validation"),
            **run.judged_answers(run.config.evaluate.gpus_per_actor, engine=run.config.evaluate.engine),
        }
        stage = Stage(name=name, inputs=inputs, work=work)
        return run_stage(stage, run.directory.folder).folder.read_frame(ANSWERS)

    def _next(self, state: _State, report: RoundReport, outcome: Outcome) -> _State:
        """What the next round starts from."""
        if self.config.rounds.action == "weight":
            weights = raised_weights(state.weights, report.lagging, self.config.rounds.weight_factor)
            return replace(state, weights=weights, before=outcome)
        found = self._identify_anew(report.lagging, outcome)
        masks = state.masks if found is None else exchanged_masks(state.masks, found)
        return replace(state, masks=masks, before=outcome)

    def _identify_anew(self, lagging: tuple[int, ...], outcome: Outcome) -> ExpertMasks | None:
        """Masks of the lagging batches, from how the model routes after a round; None = no expert is unsafe enough."""
        run, scores, weights = self.run_context, needed_scores(self.config), needs_weights(self.config)

        def work(folder: Folder) -> dict[str, Any]:
            rows = self.batches[self.batches["batch_idx"].isin(lagging)]
            config = replace(self.config, capture=replace(self.config.capture, scores=scores, weights=weights))
            job = _CountJob(config=config, adapter=outcome.folder.url)
            gpus = gpus_of(self.config.capture.gpus_per_actor)
            with run.models.working([rows], _CountActor, job, what="routing after a round", gpus=gpus) as results:
                (counts,) = results
            folder.write_table(_COUNTS, counts_to_table(counts))
            return {"batches": len(lagging)}

        inputs = {
            "experts": outcome.made("experts"),
            "lagging": list(lagging),
            "capture": capture_inputs(run, scores, weights=weights),
        }
        routing = run_stage(Stage(name=_ROUTING, inputs=inputs, work=work), outcome.folder)
        counts = table_to_counts(routing.folder.read_table(_COUNTS))
        try:
            return identify_masks(counts, self.config.identify, seed=self.config.seed)
        except NothingSelected as error:
            logger.info("rounds: the lagging batches keep their experts: %s", error)
            return None

    def _keep(self, folders: list[Folder]) -> None:
        """Copies the last round's experts and masks to the run's folder, and joins the histories of all these rounds."""
        out = self.run_context.directory.sub(FINETUNE)
        lines: list[dict[str, Any]] = []
        for number, folder in enumerate(folders, start=1):
            for step in read_history(folder):
                lines.append({**step, "step": len(lines), "round": number})
        write_history(out, lines)
        write_masks(out, read_masks(folders[-1]))
        copy_adapter(folders[-1], out)


@dataclass(frozen=True, kw_only=True)
class _CountJob:
    """What is counted anew after a round: with which settings, and the folder of the learned experts."""

    config: Config
    adapter: str


class _CountActor(ModelWork):
    """Counts rows with learned experts in the model."""

    job: _CountJob

    @contextmanager
    def in_force(self) -> Iterator[None]:
        with self.holder.with_adapter(Folder.open(self.job.adapter)):
            yield

    def __call__(self, block: pd.DataFrame) -> RoutingCounts:
        holder, config = self.holder, self.job.config
        return capture_batches(
            holder.model, holder.tokenizer, frame_to_batches(block), config.capture, seed=config.seed
        )
