"""Distributed answering: model processes generate and score, and write what they have as they go.

Each call writes its rows as one Parquet part, whole or not at all, so an evaluation that is killed goes on with the
rows that have no part yet. Answers are on disk before anyone judges them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from moe_ray.config.auto import gpus_of, processes_of
from moe_ray.errors import InputError
from moe_ray.evaluation.answering_order import in_answering_order, in_frame_order, rows_per_block
from moe_ray.evaluation.evaluate import INPUT_COLUMNS, answer_and_count, rows_to_answer
from moe_ray.evaluation.first_token_pass import first_token_table
from moe_ray.evaluation.generated import Generated
from moe_ray.evaluation.samples import SAMPLE
from moe_ray.identification.mask_files import read_masks
from moe_ray.models.loss import text_losses
from moe_ray.models.token_budget import TokenBudget
from moe_ray.orchestration.cluster.model_actor import ModelWork
from moe_ray.orchestration.cluster.model_pool import ModelPool, pool_for
from moe_ray.orchestration.cluster.model_process import ModelHolder
from moe_ray.orchestration.cluster.progress import progress
from moe_ray.orchestration.jobs.answer_job import AnswerJob, as_table, blocks_of
from moe_ray.orchestration.jobs.engine_answer import generate_by_engine
from moe_ray.routing.count_tables import counts_to_table, table_to_counts
from moe_ray.routing.counts import RoutingCounts, concat_counts
from moe_ray.storage.fingerprint import content_hash
from moe_ray.storage.folder import Folder

_KEYS = ["routing", "id", SAMPLE]
_COLUMNS = [*INPUT_COLUMNS, "place", "routing", SAMPLE]
_NEUTRAL = "neutral"


class AnswerActor(ModelWork):
    """Answers prompts and scores their targets; for neutral texts, only scores them."""

    job: AnswerJob

    def __init__(self, holder: ModelHolder, job: AnswerJob) -> None:
        super().__init__(holder, job)
        self.run = Folder.open(job.run_url)
        self.parts = self.run.sub(job.parts)
        self.masks = None if job.masks is None else read_masks(self.run.sub(job.masks))
        self.budget = TokenBudget(job.config.tokens_per_forward)
        self.first_of = None if job.first_of is None else read_answers(self.run.sub(job.first_of)).first_tokens
        self.generated = None if job.config.engine == "transformers" else Generated(self.parts)

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """The learned experts are in the model, where the job has some."""
        with self.holder.with_adapter(None if self.job.adapter is None else self.run.sub(self.job.adapter)):
            yield

    def __call__(self, batch: dict[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
        """Does one block of rows and writes its part; returns what was done."""
        rows = pd.DataFrame(batch)
        is_text = rows["routing"] == _NEUTRAL
        for chosen, work in ((rows[is_text], self._score), (rows[~is_text], self._answer)):
            if len(chosen):
                work(chosen, content_hash(chosen[_KEYS].to_numpy().tolist()))
        return {"place": rows["place"].to_numpy()}

    def _score(self, rows: pd.DataFrame, name: str) -> None:
        holder = self.holder
        losses = text_losses(holder.model, holder.tokenizer, rows["target"].tolist(), budget=self.budget)
        self.parts.write_table(f"neutral-{name}.parquet", losses.assign(text=rows["place"].to_numpy()))

    def _answer(self, rows: pd.DataFrame, name: str) -> None:
        job, holder = self.job, self.holder
        done = answer_and_count(
            *(holder.model, holder.tokenizer, rows, job.config, self.masks),
            budget=self.budget,
            count=job.count,
            short_layers=job.short_layers,
            after_thought=job.after_thought,
            generated=self.generated,
        )
        # The answers come last: with them the part is whole.
        is_first = (rows["label"] == "safe") & (rows["routing"] == "natural") & (rows[SAMPLE] == 0)
        if job.count and is_first.any():
            first = first_token_table(
                holder.model, holder.tokenizer, rows[is_first], budget=self.budget, at=self.first_of
            )
            self.parts.write_table(f"first-{name}.parquet", first)
        if done.routing is not None:
            self.parts.write_table(f"routing-{name}.parquet", counts_to_table(done.routing))
        self.parts.write_table(f"answers-{name}.parquet", as_table(done.answers))


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What the parts of a finished job hold.

    Attributes:
        answers: a row per example and kind of routing, without verdicts, ordered by routing and place.
        neutral: `text`, `loss` (summed nats), `num_tokens` per neutral text; None = none were scored.
        routing: counts of the prompts under natural routing; None = not counted.
        first_tokens: what is said first to safe prompts, from `first_token_table`; None = not looked at.
    """

    answers: pd.DataFrame
    neutral: pd.DataFrame | None
    routing: RoutingCounts | None
    first_tokens: pd.DataFrame | None = None


def answer(
    examples: pd.DataFrame,
    job: AnswerJob,
    *,
    what: str,
    routing: Sequence[str] = ("natural",),
    neutral: Sequence[str] = (),
    models: ModelPool | None = None,
) -> Answers:
    """Answers and target losses of the examples; what `job.parts` holds already is not done again.

    Args:
        examples: rows with `INPUT_COLUMNS`.
        job: model, sizes, folders.
        what: what this is, for the progress bar.
        routing: kinds of `evaluate.routing`.
        neutral: plain texts whose loss is wanted.
        models: the processes; None = some for this job alone.
    """
    parts = Folder.open(job.run_url).sub(job.parts)
    rows = rows_to_answer(examples, routing, job.config.samples)[_COLUMNS]
    if neutral:
        rows = pd.concat([rows, pd.DataFrame([_text_row(index, text) for index, text in enumerate(neutral)])])
    todo = _not_done(rows, parts)
    if len(todo):
        if job.config.engine == "vllm":
            generate_by_engine(todo, job, what=what, models=models)
        with pool_for(job.model, models) as pool:
            _run(pool, todo, job, what)
    return read_answers(parts)


def _text_row(index: int, text: str) -> dict[str, Any]:
    empty = dict.fromkeys(("label", "category", "messages"), "")
    keys = {"id": str(index), "place": index, "routing": _NEUTRAL, SAMPLE: 0, "batch_idx": -1}
    return {**empty, **keys, "target": text, "target_complete": False, "pair": None}


def _not_done(rows: pd.DataFrame, parts: Folder) -> pd.DataFrame:
    done = [parts.read_table(name).select(_KEYS).to_pandas() for name in _names(parts, "answers")]
    for name in _names(parts, _NEUTRAL):
        indices = parts.read_frame(name)["text"].astype(str)
        done.append(pd.DataFrame({"routing": _NEUTRAL, "id": indices, SAMPLE: 0}))
    if not done:
        return rows
    return rows[~pd.MultiIndex.from_frame(rows[_KEYS]).isin(pd.MultiIndex.from_frame(pd.concat(done)))]


def _run(models: ModelPool, todo: pd.DataFrame, job: AnswerJob, what: str) -> None:
    config = job.config
    work = models.working(
        blocks_of(as_table(in_answering_order(todo)[_COLUMNS]), rows_per_block(todo, config)),
        AnswerActor,
        job,
        what=what,
        num_processes=processes_of(config.num_actors),
        gpus=gpus_of(config.gpus_per_actor),
    )
    with work as results, progress(what, len(todo)) as meter:
        for done in results:
            meter.advance(len(done["place"]))


def read_answers(parts: Folder) -> Answers:
    """What a finished job wrote.

    Raises:
        InputError: there are no answers.
    """
    names = _names(parts, "answers")
    if not names:
        raise InputError(f"no answers in {parts.url}; run the evaluation")
    answers = in_frame_order(pd.concat([parts.read_frame(name) for name in names], ignore_index=True))
    texts = [parts.read_frame(name) for name in _names(parts, _NEUTRAL)]
    # Counts without answers are of a call that was killed in between, whose rows were done again.
    counted = [name for name in _names(parts, "routing") if name.replace("routing", "answers", 1) in names]
    counts = [table_to_counts(parts.read_table(name)) for name in counted]
    firsts = [name for name in _names(parts, "first") if name.replace("first", "answers", 1) in names]
    return Answers(
        answers=answers,
        neutral=pd.concat(texts).sort_values("text", ignore_index=True) if texts else None,
        routing=concat_counts(counts) if counts else None,
        first_tokens=pd.concat([parts.read_frame(name) for name in firsts], ignore_index=True) if firsts else None,
    )


def _names(parts: Folder, kind: str) -> list[str]:
    return [name for name in parts.names() if name.startswith(f"{kind}-") and name.endswith(".parquet")]
