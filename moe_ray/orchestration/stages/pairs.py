"""Stage `pairs`: which pairs are kept, as the model answers to both forms of each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from moe_ray.orchestration.stages.answering import answered, judged, too_long_policy, unaskable_of
from moe_ray.orchestration.stages.context import Context
from moe_ray.prompts.example_index import NONE
from moe_ray.prompts.example_tables import ROWS_PER_GROUP
from moe_ray.prompts.pair_filter import pair_counts, pair_outcomes, unanswered_pairs
from moe_ray.prompts.prompt_set import without_pairs
from moe_ray.prompts.spooled_examples import SpooledExamples, index_of
from moe_ray.run_directory import PAIR_OUTCOMES, PAIRS, VERDICTS
from moe_ray.storage.folder import Folder
from moe_ray.storage.stage import Outcome, Stage

_PAIR_ANSWERS = f"{PAIRS}/answers"
_IS_TRUE = ("safe_refused", "attack_refused", "kept")
_SCHEMA = pa.schema(
    [
        ("pair", pa.string()),
        ("category", pa.string()),
        *((name, pa.bool_()) for name in _IS_TRUE),
        ("reason", pa.string()),
    ]
)


def filter_pairs(run: Context) -> Outcome:
    """Finds which pairs are kept, and groups the run's prompts anew from those; does so only once in a run."""
    if PAIRS in run.outcomes:
        return run.outcomes[PAIRS]
    examples = run.prompts.examples
    assert isinstance(examples, SpooledExamples), examples
    pairs = examples.pick(np.flatnonzero(index_of(examples).pair != NONE).astype(np.int32))
    inputs = {
        "pairs": pairs.digest(),
        "prompts.keep_pairs": run.config.prompts.keep_pairs,
        "capture.too_long": too_long_policy(run),
        **run.judged_answers(run.config.evaluate.gpus_per_actor, engine=run.config.evaluate.engine),
    }
    outcome = run.do(Stage(name=PAIRS, inputs=inputs, work=lambda folder: _judge_pairs(run, pairs, folder)))
    with outcome.folder.open_parquet(PAIR_OUTCOMES) as file:
        is_kept = file.read(columns=["kept"])["kept"].to_numpy()
    run.prompts = without_pairs(run.prompts, is_kept, run.config)
    return outcome


def _judge_pairs(run: Context, pairs: SpooledExamples, folder: Folder) -> dict[str, Any]:
    """Writes a row per pair, in the order of their first examples; returns how many are kept and dropped."""
    unaskable = unaskable_of(run)
    totals, dropped = Counter[str](), Counter[str]()
    with folder.growing_table(PAIR_OUTCOMES, _SCHEMA, row_group_size=ROWS_PER_GROUP) as append:
        for number, table in enumerate(whole_pairs(pairs.tables())):
            frame = table.to_pandas().assign(batch_idx=-1, target=None)
            bad = frame["pair"].isin(frame.loc[list(unaskable(frame)), "pair"])
            outcomes = [unanswered_pairs(frame[bad])]
            if not bad.all():
                part = f"_{number}" if number else ""
                answers = answered(run, frame[~bad], f"{_PAIR_ANSWERS}{part}", "answers, pairs")
                with_verdicts = judged(run, answers, folder.sub(f"{VERDICTS}{part}"), "verdicts, pairs")
                outcomes.insert(0, pair_outcomes(with_verdicts))
            found = pd.concat(outcomes, ignore_index=True).set_index("pair").loc[frame["pair"].unique()].reset_index()
            append(pa.Table.from_pandas(found.astype(dict.fromkeys(_IS_TRUE, bool)), schema=_SCHEMA))
            counts = pair_counts(found)
            dropped.update(counts.pop("dropped"))
            totals.update(counts)
    return {**totals, "dropped": dict(dropped.most_common())}


def whole_pairs(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """The same rows, cut so that the forms of a pair, which stand next to each other, are in one table."""
    held: pa.Table | None = None
    for table in tables:
        rows = table if held is None else pa.concat_tables([held, table])
        is_last = pc.equal(rows["pair"], rows["pair"][-1])
        whole = rows.num_rows - int(pc.sum(is_last).as_py())
        held = rows.slice(whole)
        if whole:
            yield rows.slice(0, whole)
    if held is not None:
        yield held
