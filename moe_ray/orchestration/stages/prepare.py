"""Stage `prepare`: prompts to batches and held-out examples, with a target for each.

Examples come from the local disk as tables of bounded size, and each table is done with before the next one is read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from moe_ray.evaluation.evaluate import ReferenceBatches
from moe_ray.finetuning.targets import TARGETS, Asking, check_left_out, fill_targets, left_out_rows
from moe_ray.identification.controls import FACTORS
from moe_ray.orchestration.stages.answering import answered, too_long_policy, unaskable_of
from moe_ray.orchestration.stages.context import Context
from moe_ray.orchestration.stages.pairs import filter_pairs
from moe_ray.prompts.batches import EqualBatches
from moe_ray.prompts.example_rows import EXAMPLE_SCHEMA
from moe_ray.prompts.example_tables import BATCH_SCHEMA, BATCHES, ROWS_PER_GROUP
from moe_ray.prompts.examples import Example
from moe_ray.prompts.quarantine import Rejected
from moe_ray.prompts.spooled_examples import SpooledExamples, index_of
from moe_ray.prompts.units import grouped
from moe_ray.run_directory import ANSWERS, LEFT_OUT, OWN_ANSWERS, PARTS, PROMPTS, TEST, VALIDATION
from moe_ray.storage.fingerprint import TableHash, content_hash, frame_hash
from moe_ray.storage.folder import Folder
from moe_ray.storage.stage import MADE, Outcome, Stage

_LEFT_OUT_COLUMNS = ("split", "id", "label", "category", "reason", "detail")
_HELD_OUT_SCHEMA = pa.schema([*EXAMPLE_SCHEMA, ("batch_idx", pa.int64())])

_ROWS_TOGETHER, _BYTES_TOGETHER = 1 << 17, 128 << 20
"""Examples whose missing targets are asked for at once."""

Unaskable = Callable[[pd.DataFrame], dict[Any, Rejected]]


def prepare(run: Context) -> Outcome:
    """The batches and the held-out examples, with a target for each.

    Makes `examples` (what is captured), `targets` (what is trained on), `fields` (what prompts are about and in what
    wording), `test` and `validation`.
    """
    if run.config.prompts.keep_pairs != "all":
        filter_pairs(run)
    batches = _batches(run)
    used = [batches.examples, run.prompts.validation, run.prompts.test]
    inputs = {
        "examples": content_hash(
            [
                batches.size,
                hashlib.sha256(batches.batch_idx.tobytes()).hexdigest(),
                *(_on_disk(examples).digest() for examples in used),
            ]
        ),
        **run.settings("targets"),
        "capture.too_long": too_long_policy(run),
        **run.checkpoint,
        **run.numerics(run.config.evaluate.gpus_per_actor, engine=run.config.evaluate.engine),
    }
    return run.do(Stage(name=PROMPTS, inputs=inputs, work=lambda folder: _write_prompts(run, folder)))


def _batches(run: Context) -> EqualBatches:
    """The run's batches, which lie on the local disk, as all prompts of `read_prompts` do."""
    assert isinstance(run.prompts.batches, EqualBatches), run.prompts
    return run.prompts.batches


def _on_disk(examples: Sequence[Example]) -> SpooledExamples:
    assert isinstance(examples, SpooledExamples), examples
    return examples


def _write_prompts(run: Context, folder: Folder) -> dict[str, Any]:
    batches, unaskable = _batches(run), unaskable_of(run)
    reference = _reference_batches(batches)
    left_out: list[dict[str, Any]] = []
    made = {}
    for file, examples in ((TEST, run.prompts.test), (VALIDATION, run.prompts.validation)):
        split = file.partition(".")[0]
        if not examples and file == VALIDATION:
            continue
        asked, unasked = _held_out_to_ask(run, _on_disk(examples), split, unaskable)
        left_out += unasked
        digest = TableHash()
        with folder.growing_table(file, _HELD_OUT_SCHEMA, row_group_size=ROWS_PER_GROUP) as append:
            for number, table in enumerate(_together(asked.tables())):
                frame = table.select(["label", "category", "pair"]).to_pandas()
                placed = table.append_column("batch_idx", pa.array(reference.assign(frame).to_numpy()))
                filled = _with_targets(run, placed, split, number, unaskable)
                digest.update(filled.drop_columns(list(FACTORS)))
                append(filled)
        made[split] = digest.digest()
    # The capture does not read targets, so another refusal captures nothing again; and neither it nor the training reads
    # what prompts are about.
    without_targets, with_targets, of_fields = TableHash(), TableHash(), TableHash()
    with folder.growing_table(BATCHES, BATCH_SCHEMA, row_group_size=ROWS_PER_GROUP) as append:
        for number, table in enumerate(_together(_batch_tables(batches))):
            without_targets.update(table.drop_columns([*TARGETS, *FACTORS]))
            of_fields.update(table.select(list(FACTORS)))
            filled = _with_targets(run, table, "train", number, unaskable)
            with_targets.update(filled.drop_columns(list(FACTORS)))
            append(filled)
    made |= {"examples": without_targets.digest(), "targets": with_targets.digest()}
    made["fields"] = of_fields.digest()
    folder.write_table(LEFT_OUT, pd.DataFrame(left_out, columns=[*_LEFT_OUT_COLUMNS]))
    num_test = len(run.prompts.test) - sum(row["split"] == "test" for row in left_out)
    return {
        "examples": len(batches.examples),
        "test_examples": num_test,
        "left_over": len(run.prompts.assembly.left_over),
        "left_out": len(left_out),
        MADE: made,
    }


def _together(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """The same rows in larger tables: the model is started anew for each that has examples to ask it."""
    held: list[pa.Table] = []
    for table in tables:
        held.append(table)
        if sum(map(len, held)) >= _ROWS_TOGETHER or sum(one.nbytes for one in held) >= _BYTES_TOGETHER:
            yield pa.concat_tables(held)
            held = []
    if held:
        yield pa.concat_tables(held)


def _batch_tables(batches: EqualBatches) -> Iterator[pa.Table]:
    """The examples of all batches with `batch_idx` and `in_batch_idx`."""
    row = 0
    for table in _on_disk(batches.examples).tables():
        batch, position = np.divmod(np.arange(row, row + table.num_rows), batches.size)
        row += table.num_rows
        columns = [pa.array(batches.batch_idx[batch]), pa.array(position), *table.columns]
        yield pa.Table.from_arrays(columns, schema=BATCH_SCHEMA)


def _reference_batches(batches: EqualBatches) -> ReferenceBatches:
    """What gives held-out examples their reference batches, from the index of the batches' examples."""
    index = index_of(batches.examples)
    unsafe = np.flatnonzero(index.is_unsafe)
    of_category = {
        index.categories[category]: np.unique(batches.batch_idx[unsafe[members] // batches.size])
        for category, members in grouped(index.category[unsafe])
    }
    return ReferenceBatches(np.sort(batches.batch_idx), of_category)


def _held_out_to_ask(
    run: Context, examples: SpooledExamples, split: str, unaskable: Unaskable
) -> tuple[SpooledExamples, list[dict[str, Any]]]:
    """The held-out examples that can be answered, and a row for each that is left out; see `held_out_to_ask`."""
    left_out: list[dict[str, Any]] = []
    is_asked = np.ones(len(examples), dtype=np.bool_)
    row = 0
    for table in examples.tables(["id", "label", "category", "messages"]):
        frame = table.to_pandas().set_index(np.arange(row, row + table.num_rows))
        row += table.num_rows
        bad = unaskable(frame)
        is_asked[list(bad)] = False
        left_out += left_out_rows(frame, split, bad)
    check_left_out(left_out, len(examples), split, max_bad_share=run.config.capture.max_bad_share)
    return examples.pick(np.flatnonzero(is_asked).astype(np.int32)), left_out


def _with_targets(run: Context, table: pa.Table, split: str, number: int, unaskable: Unaskable) -> pa.Table:
    """A table of examples with a target for each that can have one.

    Args:
        run: the run.
        table: of the split's tables.
        split: its name.
        number: of the table.
        unaskable: from `unaskable_of`.
    """
    if not table["target"].null_count:
        return table
    asking = Asking(unaskable=unaskable, answers=lambda rows: _own_answers(run, rows, split, number))
    frame = table.drop_columns(["response", "split"]).to_pandas()
    filled = fill_targets(frame, run.config.prompts.refusal, asking)
    for name in TARGETS:
        column = pa.array(filled[name], type=table.schema.field(name).type, from_pandas=True)
        table = table.set_column(table.column_names.index(name), name, column)
    return table


def _own_answers(run: Context, asked: pd.DataFrame, split: str, number: int) -> pd.DataFrame:
    """The model's own answers. They are separate stages, so that another refusal text asks for none of them again."""
    name, tokens = f"{OWN_ANSWERS}/{split}" + (f"_{number}" if number else ""), run.config.prompts.own_answer_tokens
    inputs = {
        "prompts": frame_hash(asked[["id", "messages"]]),
        "prompts.own_answer_tokens": tokens,
        **run.checkpoint,
        **run.numerics(run.config.evaluate.gpus_per_actor, engine=run.config.evaluate.engine),
    }

    def work(folder: Folder) -> dict[str, Any]:
        answers = answered(
            run, asked, f"{name}/{PARTS}", f"own answers, {split}", max_new_tokens=tokens, after_thought=True
        )
        folder.write_table(ANSWERS, answers[["id", "answer", "ended"]])
        return {"answers": len(answers)}

    return run.do(Stage(name=name, inputs=inputs, work=work)).folder.read_frame(ANSWERS)
