"""Distributed routing capture: model processes count, and write what they counted as they go.

The driver hands out windows of the stored examples that are not counted yet, of some seconds of work each, as it was
measured so far; an actor reads, counts and writes a window. So the driver holds 40 bytes and a bit per example and actors
hold a part of theirs, whatever the number of prompts; a capture that is killed goes on with the examples that no part holds
yet.
"""

from __future__ import annotations

import logging
import uuid
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from moe_ray.config.auto import gpus_of, processes_of
from moe_ray.config.capture import CaptureConfig
from moe_ray.config.model import ModelConfig
from moe_ray.errors import InputError
from moe_ray.evaluation.own_answers import OwnAnswers, refusals_warning
from moe_ray.orchestration.cluster.model_pool import ModelPool, pool_for
from moe_ray.orchestration.cluster.progress import progress
from moe_ray.orchestration.jobs.capture_actor import CaptureActor, CaptureJob
from moe_ray.orchestration.jobs.capture_window import WindowReport
from moe_ray.prompts.example_tables import BATCHES
from moe_ray.prompts.quarantine import QUARANTINE, TRUNCATED, quarantine_frame
from moe_ray.report.run_text import describe_reasons
from moe_ray.routing.count_keys import keys_of, remove_doubles, remove_unreadable, rows_without
from moe_ray.routing.count_store import count_tokens
from moe_ray.routing.window_plan import WindowPlan
from moe_ray.run_directory import (
    ABOUT_MODEL,
    ATTEMPTS,
    CAPTURE,
    PARITY,
    PROMPTS,
    REJECTED,
    RESPONSES,
    SHORTENED,
    RunDirectory,
)
from moe_ray.storage.folder import Folder

logger = logging.getLogger(__name__)


def capture(
    run: RunDirectory,
    model: ModelConfig,
    config: CaptureConfig,
    *,
    seed: int = 0,
    actor: type[CaptureActor] = CaptureActor,
    seconds_per_part: float = CaptureJob.seconds_per_part,
    models: ModelPool | None = None,
) -> dict[str, Any]:
    """Counts the routing of every stored example that is not counted yet.

    Args:
        run: its prepared batches are read. Its capture folder gets `counts`, a folder of Parquet parts;
            `quarantine.parquet`; `truncated.parquet`; `responses`, a folder of parts, where they are generated. It may
            hold those of an unfinished capture.
        model: which model.
        config: actors, sizes and policies.
        seed: of sampled responses.
        actor: what the processes do.
        seconds_per_part: how long a process may work before it writes.
        models: the processes; None = some for this capture alone.

    Returns:
        `examples`, counted and quarantined ones; `tokens`, counted ones of all parts; `padding_share`, of the tokens that
        went through forward passes now (0 to 1; None where there were none); `forwards`, forward passes now; `halvings`,
        how often memory ran out; `quarantined` and `truncated`, examples; `reasons`, quarantined examples by reason;
        `experts_are_copies`, of the model, see `models.expert_copies` (None where an engine counted); `own_answers`,
        see `OwnAnswers`; where an engine counted also `engine`, what it was and how its routes agree with transformers'.

    Raises:
        InputError: more than `config.max_bad_share` of the examples cannot be captured, or one is too long and
            `config.too_long` is `error`; or an engine's routes are not of the form that is known, or not transformers'.
    """
    job = CaptureJob(
        model=model,
        config=config,
        run_url=run.folder.url,
        session=uuid.uuid4().hex,
        seed=seed,
        seconds_per_part=seconds_per_part,
    )
    batch_idx, todo = _examples_to_do(run)
    bad = _Quarantined(run, total=len(batch_idx), max_share=config.max_bad_share)
    totals = WindowReport()
    if len(todo):
        plan = WindowPlan(batch_idx[todo], num_processes=max(processes_of(config.num_actors), config.max_actors))
        if config.engine == "vllm":
            from moe_ray.orchestration.jobs.engine_capture import EngineCaptureActor, checked_engines

            with checked_engines(run, job, todo, models) as engines:
                _run(engines, job, plan, todo, EngineCaptureActor, totals, bad)
        else:
            with pool_for(model, models) as pool:
                _run(pool, job, plan, todo, actor, totals, bad)
        # Processes that died did not report what they had set aside.
        _Quarantined(run, total=len(batch_idx), max_share=config.max_bad_share)
    return _finish(run, totals, examples=len(batch_idx)) | _engine_notes(run, config)


def _run(
    models: ModelPool,
    job: CaptureJob,
    plan: WindowPlan,
    todo: npt.NDArray[np.int64],
    actor: type[CaptureActor],
    totals: WindowReport,
    bad: _Quarantined,
) -> None:
    def windows() -> Iterator[npt.NDArray[np.int64]]:
        while (window := plan.next()) is not None:
            yield todo[window.start : window.stop]

    config = job.config
    work = models.working(
        windows(),
        actor,
        job,
        what="routing capture",
        num_processes=processes_of(config.num_actors),
        max_processes=config.max_actors,
        gpus=gpus_of(config.gpus_per_actor),
        overlaps=True,
    )
    with work as reports, progress("routing capture", len(todo)) as meter:
        for report in reports:
            plan.measured(report.examples, report.seconds)
            for name in ("tokens", "padded", "forwards", "halvings"):
                setattr(totals, name, getattr(totals, name) + getattr(report, name))
            bad.add(report.quarantined)
            meter.advance(report.examples)


class _Quarantined:
    """Counts quarantined examples, and refuses too many of them."""

    def __init__(self, run: RunDirectory, *, total: int, max_share: float) -> None:
        self.directory, self.total, self.max_share = run, total, max_share
        self.count = len(_quarantined_so_far(run))
        self.add(0)

    def add(self, more: int) -> None:
        """Some more are quarantined.

        Raises:
            InputError: there are too many.
        """
        self.count += more
        if self.count > self.max_share * self.total:
            frame = _quarantined_so_far(self.directory)
            first = frame.iloc[0]
            raise InputError(
                f"{self.count} of {self.total} examples cannot be captured, expected at most a share of "
                f"{self.max_share:g}: {describe_reasons(Counter(frame['reason']))}; the first is {first['id']!r} "
                f"({first['detail']!r}), all are in {self.directory.sub(REJECTED).path}; mend or remove them, or raise "
                "capture.max_bad_share"
            )


def _examples_to_do(run: RunDirectory) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """`batch_idx` of every stored example, and the positions of those that are neither counted nor quarantined."""
    with run.sub(PROMPTS).open_parquet(BATCHES) as file:
        table = file.read(columns=["batch_idx", "in_batch_idx"])
    batch_idx = table["batch_idx"].to_numpy()
    keys = keys_of(batch_idx, table["in_batch_idx"].to_numpy())
    todo = np.arange(len(keys))
    for folder in (run.counts_folder, run.sub(REJECTED)):
        remove_unreadable(folder)
        todo = todo[rows_without(keys[todo], folder, folder.parquet_names())]
    out = run.sub(CAPTURE)
    if out.exists(QUARANTINE):
        todo = todo[rows_without(keys[todo], out, [QUARANTINE])]
    return batch_idx, todo


def _finish(run: RunDirectory, totals: WindowReport, *, examples: int) -> dict[str, Any]:
    out = run.sub(CAPTURE)
    doubled = remove_doubles(run.counts_folder)
    if doubled:
        logger.info("routing capture: %d rows were written twice; one of each is kept", doubled)
    quarantined = _quarantined_so_far(run)
    out.write_table(QUARANTINE, quarantined)
    before = [out.read_frame(TRUNCATED)] if out.exists(TRUNCATED) else []
    shortened = quarantine_frame(pd.concat([*before, _read_parts(run.sub(SHORTENED))], ignore_index=True))
    out.write_table(TRUNCATED, shortened)
    if not run.counts_folder.parquet_names():
        raise InputError("no example could be captured: " + describe_reasons(Counter(quarantined["reason"])))
    for name in (REJECTED, SHORTENED, ATTEMPTS):
        run.sub(name).delete()
    about = out.read_json(ABOUT_MODEL) if out.exists(ABOUT_MODEL) else {"experts_are_copies": None}
    return {
        "examples": examples,
        "tokens": count_tokens(run.counts_folder),
        "padding_share": round(1 - totals.tokens / totals.padded, 4) if totals.padded else None,
        "forwards": totals.forwards,
        "halvings": totals.halvings,
        "quarantined": len(quarantined),
        "truncated": len(shortened),
        "reasons": dict(Counter(quarantined["reason"].tolist())),
        "experts_are_copies": about["experts_are_copies"],
        "own_answers": _own_answers(run).as_dict(),
    }


def _engine_notes(run: RunDirectory, config: CaptureConfig) -> dict[str, Any]:
    """What an engine's first window was held against, where one counted."""
    if config.engine == "transformers":
        return {}
    return {"engine": {"name": config.engine, **run.sub(CAPTURE).read_json(PARITY)}}


def _own_answers(run: RunDirectory) -> OwnAnswers:
    """Of all parts, one of which is held at a time; warns where most of those to unsafe prompts refuse."""
    totals, folder = OwnAnswers(), run.sub(RESPONSES)
    for name in folder.parquet_names():
        rows = folder.read_frame(name)
        for label, text, ids, ended in zip(rows["label"], rows["response"], rows["ids"], rows["ended"], strict=True):
            totals.add(label, text, len(ids), ended=ended)
    if warning := refusals_warning(totals.as_dict()):
        logger.warning("capture: %s", warning)
    return totals


def _quarantined_so_far(run: RunDirectory) -> pd.DataFrame:
    out = run.sub(CAPTURE)
    before = [out.read_frame(QUARANTINE)] if out.exists(QUARANTINE) else []
    return quarantine_frame(pd.concat([*before, _read_parts(run.sub(REJECTED))], ignore_index=True))


def _read_parts(folder: Folder) -> pd.DataFrame:
    frames = [folder.read_frame(name) for name in folder.parquet_names()]
    return pd.concat(frames, ignore_index=True) if frames else quarantine_frame([])
