"""Judging stored answers: verdicts are written as they come, so a judge that fails costs no answer and no verdict.

`judge` is the one entry for verdicts of answers in a run; in memory it is `moe_ray.evaluation.judges.judge_answers`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import pandas as pd

from moe_ray.config.auto import gpus_of, processes_of
from moe_ray.config.evaluate import EvaluateConfig
from moe_ray.evaluation.judges import conversations_of, judged_conversations, make_judge, with_verdicts
from moe_ray.evaluation.judges.verdict import Verdict
from moe_ray.evaluation.samples import with_sample
from moe_ray.orchestration.cluster.actor_pool import in_actors
from moe_ray.orchestration.cluster.model_process import process_device, quiet_and_threaded
from moe_ray.orchestration.cluster.node_share import processes_on_this_node
from moe_ray.orchestration.cluster.progress import progress
from moe_ray.storage.fingerprint import content_hash
from moe_ray.storage.folder import Folder

_KEYS = ["routing", "id", "sample"]
_JUDGED = ("messages", "answer", "is_unclosed")
"""What `conversations_of` looks at; tables of earlier versions do not have all of it."""
_SECONDS_BETWEEN_PARTS = 5.0
_ANSWERS_PER_BLOCK = 128
"""That a classifier or a guard judges before it writes its verdicts."""


LOCAL_MODELS = ("classifier", "guard")
"""Judges that are models of our own, which work in actors with the evaluation's share of a GPU."""


class JudgeActor:
    """Holds a classifier or a guard and judges the answers it is given."""

    def __init__(self, config: EvaluateConfig, parts_url: str) -> None:
        quiet_and_threaded(processes_on_this_node(processes_of(config.num_actors)))
        self.judge = make_judge(config, device=process_device())
        self.parts = Folder.open(parts_url)

    def __call__(self, rows: pd.DataFrame) -> int:
        """Judges one block of answers and writes its part; returns how many there were."""
        verdicts = dict(judged_conversations(self.judge, conversations_of(rows)))
        _write(self.parts, rows, verdicts)
        return len(rows)


def judge(answers: pd.DataFrame, config: EvaluateConfig, parts: Folder, *, what: str) -> pd.DataFrame:
    """The answers with verdicts, as `judge_answers` gives them; those that `parts` holds already are not asked for again.

    Args:
        answers: rows with `routing`, `id`, `messages` and `answer`, with `is_unclosed` where a thought may have had no end,
            and with `sample` where a prompt was answered more than once.
        config: the judge.
        parts: folder of Parquet parts; may hold those of an unfinished judging.
        what: what this is, for the progress bar.

    Raises:
        OutsideFailed: a verdict could not be had; those that could are in `parts`.
    """
    answers, known = with_sample(answers), _read(parts)
    keys = list(answers[_KEYS].itertuples(index=False, name=None))
    todo = answers[[key not in known for key in keys]]
    if len(todo):
        with progress(what, len(todo)) as meter:
            work = _in_actors if config.judge in LOCAL_MODELS else _here
            for num_judged in work(todo, config, parts):
                meter.advance(num_judged)
        known = _read(parts)
    return with_verdicts(answers, [known[key] for key in keys], config.judge)


def _here(answers: pd.DataFrame, config: EvaluateConfig, parts: Folder) -> Iterator[int]:
    """Judges in this process; yields how many answers were judged since the last time."""
    fresh: dict[int, Verdict] = {}
    last_part = time.monotonic()
    try:
        for position, verdict in judged_conversations(make_judge(config), conversations_of(answers)):
            fresh[position] = verdict
            yield 1
            if time.monotonic() - last_part > _SECONDS_BETWEEN_PARTS:
                _write(parts, answers, fresh)
                fresh, last_part = {}, time.monotonic()
    finally:
        if fresh:
            _write(parts, answers, fresh)


def _in_actors(answers: pd.DataFrame, config: EvaluateConfig, parts: Folder) -> Iterator[int]:
    rows = answers[[*_KEYS, *(name for name in _JUDGED if name in answers)]].reset_index(drop=True)
    pool = in_actors(
        [rows.iloc[start : start + _ANSWERS_PER_BLOCK] for start in range(0, len(rows), _ANSWERS_PER_BLOCK)],
        JudgeActor,
        (config, parts.url),
        what="judging",
        num_actors=processes_of(config.num_actors),
        gpus_per_actor=gpus_of(config.gpus_per_actor),
    )
    with pool as results:
        yield from results


def _write(parts: Folder, rows: pd.DataFrame, verdicts: dict[int, Verdict]) -> None:
    judged = rows.iloc[list(verdicts)][_KEYS].reset_index(drop=True)
    table = judged.join(pd.DataFrame(list(verdicts.values()), columns=list(Verdict._fields)))
    name = content_hash(judged.to_numpy().tolist())
    parts.write_table(f"verdicts-{name}.parquet", table.astype({"score": "float64"}))


def _read(parts: Folder) -> dict[tuple[str, str, int], Verdict]:
    known = {}
    for name in parts.names():
        if name.startswith("verdicts-"):
            for row in parts.read_frame(name).to_dict("records"):
                score = None if np.isnan(row["score"]) else float(row["score"])
                known[row["routing"], row["id"], row["sample"]] = Verdict(row["kind"], score, str(row["said"]))
    return known
