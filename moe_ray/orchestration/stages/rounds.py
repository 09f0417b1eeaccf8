"""Rounds of fine-tuning: each a folder with a manifest, in the folder of the learned experts.

The experts that a round learned are the start of the next one. What the last of them leaves is one adapter of the original
base model; the best round's is the run's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pandas as pd
import ray

from moe_ray.config.model import ModelConfig
from moe_ray.config.run import Config
from moe_ray.errors import InputError
from moe_ray.experts import ExpertMasks
from moe_ray.finetuning.adapter import ADAPTER_FILES
from moe_ray.finetuning.history import read_history, write_history
from moe_ray.identification.mask_files import read_masks, write_masks
from moe_ray.orchestration.cluster.model_process import ModelHolder
from moe_ray.orchestration.jobs.finetune import FineTuneJob, finetune
from moe_ray.prompts.example_tables import frame_to_batches
from moe_ray.prompts.quarantine import read_training_examples
from moe_ray.report.study_text import describe_round
from moe_ray.routing.capture import count_batches
from moe_ray.routing.count_tables import counts_to_table, table_to_counts
from moe_ray.routing.counts import RoutingCounts
from moe_ray.storage.fingerprint import content_hash
from moe_ray.storage.folder import Folder
from moe_ray.studies.rounds import RoundReport, best_round, exchanged_masks, raised_weights, report_round, stop_reason
from moe_ray.studies.trial import identify_masks

logger = logging.getLogger(__name__)

_COUNTS = "counts.parquet"


@dataclass(frozen=True, kw_only=True)
class _State:
    """What a round starts from: masks and weights, and the adapter of the round before (empty = the base model)."""

    masks: ExpertMasks
    weights: Mapping[int, float] = field(default_factory=dict)
    start_url: str = ""

    def inputs(self) -> dict[str, Any]:
        """What makes a finished round reusable."""
        return {"masks": self.masks.digest(), "weights": {str(b): w for b, w in self.weights.items()}}


class Rounds:
    """The rounds of one run.

    Args:
        job: of the first round; `out_url` is the folder of the learned experts.
        config: of the run.
        inputs: everything that all rounds depend on.
        measure: gives the judged validation answers of the model with the learned experts of a folder.
    """

    def __init__(
        self,
        job: FineTuneJob,
        config: Config,
        inputs: Mapping[str, Any],
        measure: Callable[[Folder], pd.DataFrame],
    ) -> None:
        self.job, self.config, self.inputs, self.measure = job, config, inputs, measure
        routing = None if job.routing_url is None else Folder.open(job.routing_url)
        self.batches = read_training_examples(Folder.open(job.batches_url), routing)
        self.categories = {batch.batch_idx: batch.category for batch in frame_to_batches(self.batches)}
        self.out = Folder.open(job.out_url)

    def run(self) -> dict[str, Any]:
        """Runs or reuses rounds until there is a reason to stop; returns the best one's numbers and what every round did."""
        state = _State(masks=read_masks(Folder.open(self.job.masks_url)))
        reports: list[RoundReport] = []
        notes: list[dict[str, Any]] = []
        while True:
            number = len(reports) + 1
            folder = self.out.sub(f"round_{number}")
            notes.append(self._round(number, folder, state))
            answers = folder.read_frame("validation_answers.parquet")
            reports.append(report_round(number, answers, self.categories, self.config.rounds.target))
            logger.info("%s", describe_round(reports[-1], len(self.categories)))
            reason = stop_reason(reports, self.config.rounds)
            if reason:
                break
            state = self._next(state, reports[-1], folder)
        best = best_round(reports)
        logger.info("rounds: stopped, because %s; the experts of round %d are kept", reason, best.round)
        self._keep(best.round)
        return notes[best.round - 1] | {
            "rounds": [report.as_dict() for report in reports],
            "kept_round": best.round,
            "stopped_because": reason,
        }

    def _round(self, number: int, folder: Folder, state: _State) -> dict[str, Any]:
        """One round, trained and measured now or before."""
        inputs = {**self.inputs, **state.inputs(), "round": number, "start": self._hash_of(state.start_url)}
        if folder.finished(inputs):
            logger.info("round %d: reused from an earlier run", number)
            return folder.notes()
        if not folder.exists("started.json") or folder.read_json("started.json") != content_hash(inputs):
            folder.clear()
            folder.write_json("started.json", content_hash(inputs))
        write_masks(folder, state.masks)
        outcome = finetune(
            replace(
                self.job,
                masks_url=folder.url,
                out_url=folder.url,
                start_url=state.start_url,
                batch_weights=dict(state.weights),
                seed=self.job.seed + number - 1,
            )
        )
        folder.write_table("validation_answers.parquet", self.measure(folder))
        folder.finish(inputs, **outcome)
        return outcome

    def _hash_of(self, start_url: str) -> str:
        return content_hash(Folder.open(start_url).read_json("manifest.json")["inputs"]) if start_url else ""

    def _next(self, state: _State, report: RoundReport, folder: Folder) -> _State:
        """What the next round starts from."""
        if self.config.rounds.action == "weight":
            weights = raised_weights(state.weights, report.lagging, self.config.rounds.weight_factor)
            return replace(state, weights=weights, start_url=folder.url)
        found = self._identify_anew(report.lagging, folder)
        masks = state.masks if found is None else exchanged_masks(state.masks, found)
        return replace(state, masks=masks, start_url=folder.url)

    def _identify_anew(self, lagging: tuple[int, ...], folder: Folder) -> ExpertMasks | None:
        """Masks of the lagging batches from the routing of the model as the round in `folder` left it; None = no expert."""
        if not folder.exists(_COUNTS):
            rows = self.batches[self.batches["batch_idx"].isin(lagging)]
            gpus = self.config.capture.gpus_per_actor
            count = ray.remote(num_cpus=1, num_gpus=gpus)(_count_with_adapter)
            counts = ray.get(count.remote(self.job.model, rows, self.config, folder.url))
            folder.write_table(_COUNTS, counts_to_table(counts))
        try:
            return identify_masks(
                table_to_counts(folder.read_table(_COUNTS)), self.config.identify, seed=self.config.seed
            )
        except InputError as error:
            logger.info("rounds: the lagging batches keep their experts: %s", error)
            return None

    def _keep(self, number: int) -> None:
        """Makes a round's experts and masks those of the run, with the history of the rounds up to it."""
        best = self.out.sub(f"round_{number}")
        lines: list[dict[str, Any]] = []
        for earlier in range(1, number + 1):
            for step in read_history(self.out.sub(f"round_{earlier}")):
                lines.append({**step, "step": len(lines), "round": earlier})
        write_history(self.out, lines)
        write_masks(self.out, read_masks(best))
        for name in ADAPTER_FILES:
            self.out.write_bytes(name, best.read_bytes(name))


def _count_with_adapter(model: ModelConfig, rows: pd.DataFrame, config: Config, adapter: str) -> RoutingCounts:
    holder = ModelHolder(model, 1, adapter)
    return count_batches(
        holder.model,
        holder.tokenizer,
        frame_to_batches(rows),
        template_tokens=config.capture.template_tokens,
        weights=config.capture.weights,
    )
