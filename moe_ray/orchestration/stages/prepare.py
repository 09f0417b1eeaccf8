"""Stage `prepare`: prompts to batches and held-out examples, with a target for each."""

from __future__ import annotations

from typing import Any

import pandas as pd

from moe_ray.evaluation.evaluate import assign_reference_batches
from moe_ray.finetuning.targets import TARGETS, Asking, fill_targets, held_out_to_ask
from moe_ray.models.loading import context_length, load_tokenizer
from moe_ray.orchestration.stages.answering import answered, judged
from moe_ray.orchestration.stages.context import Context
from moe_ray.prompts.example_rows import example_to_row
from moe_ray.prompts.example_tables import (
    BATCHES,
    ROWS_PER_GROUP,
    batches_to_frame,
    examples_to_frame,
)
from moe_ray.prompts.pair_filter import pair_counts, pair_outcomes, unanswered_pairs
from moe_ray.prompts.prompt_set import without_pairs
from moe_ray.prompts.quarantine import Rejected
from moe_ray.routing.encode_example import TooLong, unanswerable
from moe_ray.run_directory import (
    ANSWERS,
    LEFT_OUT,
    OWN_ANSWERS,
    PAIR_OUTCOMES,
    PAIRS,
    PARTS,
    PROMPTS,
    TEST,
    VALIDATION,
    VERDICTS,
)
from moe_ray.storage.fingerprint import content_hash, frame_hash
from moe_ray.storage.folder import Folder
from moe_ray.storage.stage import MADE, Outcome, Stage

_PAIR_ANSWERS = f"{PAIRS}/answers"
_LEFT_OUT_COLUMNS = ("split", "id", "label", "category", "reason", "detail")


def filter_pairs(run: Context) -> Outcome:
    """Finds which pairs are kept, and groups the run's prompts anew from those; does so only once in a run."""
    if PAIRS in run.outcomes:
        return run.outcomes[PAIRS]
    pairs = [example for example in run.prompts.examples if example.pair is not None]
    inputs = {
        "pairs": content_hash([example_to_row(example) for example in pairs]),
        "prompts.keep_pairs": run.config.prompts.keep_pairs,
        "capture.too_long": _policy(run),
        **run.judged_answers(run.config.evaluate.gpus_per_actor),
    }

    def work(folder: Folder) -> dict[str, Any]:
        frame = examples_to_frame(pairs).assign(batch_idx=-1, target=None)
        bad = frame["pair"].isin(frame.loc[list(_unanswerable(run, frame)), "pair"])
        answers = answered(run, frame[~bad], _PAIR_ANSWERS, "answers, pairs")
        with_verdicts = judged(run, answers, folder.sub(VERDICTS), "verdicts, pairs")
        outcomes = pd.concat([pair_outcomes(with_verdicts), unanswered_pairs(frame[bad])], ignore_index=True)
        folder.write_table(PAIR_OUTCOMES, outcomes)
        return pair_counts(outcomes)

    outcome = run.do(Stage(name=PAIRS, inputs=inputs, work=work))
    outcomes = outcome.folder.read_frame(PAIR_OUTCOMES)
    run.prompts = without_pairs(run.prompts, set(outcomes.loc[~outcomes["kept"], "pair"]), run.config)
    return outcome


def prepare(run: Context) -> Outcome:
    """The batches and the held-out examples, with a target for each.

    Makes `examples` (what is captured), `targets` (what is trained on), `test` and `validation`.
    """
    if run.config.prompts.keep_pairs != "all":
        filter_pairs(run)
    groups = {str(batch.batch_idx): batch.examples for batch in run.prompts.assembly.batches}
    groups |= {"validation": tuple(run.prompts.validation), "test": tuple(run.prompts.test)}
    rows = [[group, [example_to_row(example) for example in examples]] for group, examples in groups.items()]
    inputs = {
        "examples": content_hash(rows),
        **run.settings("targets"),
        "capture.too_long": _policy(run),
        **run.checkpoint,
        **run.numerics(run.config.evaluate.gpus_per_actor),
    }
    return run.do(Stage(name=PROMPTS, inputs=inputs, work=lambda folder: _write_prompts(run, folder)))


def _write_prompts(run: Context, folder: Folder) -> dict[str, Any]:
    train = batches_to_frame(run.prompts.assembly.batches)
    held_out = {TEST: run.prompts.test}
    if run.prompts.validation:
        held_out[VALIDATION] = run.prompts.validation
    left_out: list[dict[str, Any]] = []
    made = {}
    for file, examples in held_out.items():
        split = file.partition(".")[0]
        frame = examples_to_frame(examples)
        share = run.config.capture.max_bad_share
        frame, unasked = held_out_to_ask(frame, split, _unanswerable(run, frame), max_bad_share=share)
        left_out += unasked
        frame["batch_idx"] = assign_reference_batches(frame, train)
        frame = _with_targets(run, frame, split)
        folder.write_table(file, frame)
        made[split] = frame_hash(frame)
    # The capture does not read targets, so another refusal captures nothing again.
    made["examples"] = frame_hash(train.drop(columns=list(TARGETS)))
    train = _with_targets(run, train, "train")
    made["targets"] = frame_hash(train)
    folder.write_table(BATCHES, train, row_group_size=ROWS_PER_GROUP)
    folder.write_table(LEFT_OUT, pd.DataFrame(left_out, columns=[*_LEFT_OUT_COLUMNS]))
    num_test = len(run.prompts.test) - sum(row["split"] == "test" for row in left_out)
    return {
        "examples": len(train),
        "test_examples": num_test,
        "left_over": len(run.prompts.assembly.left_over),
        "left_out": len(left_out),
        MADE: made,
    }


def _policy(run: Context) -> TooLong:
    """Of examples that are too long to be asked: what could be counted of one is no matter here."""
    return "error" if run.config.capture.too_long == "error" else "skip"


def _unanswerable(run: Context, frame: pd.DataFrame) -> dict[Any, Rejected]:
    """The rows that the model cannot be asked, each with the reason."""
    return unanswerable(frame, load_tokenizer(run.model), limit=context_length(run.model), too_long=_policy(run))


def _with_targets(run: Context, frame: pd.DataFrame, split: str) -> pd.DataFrame:
    asking = Asking(
        unaskable=lambda rows: _unanswerable(run, rows), answers=lambda rows: _own_answers(run, rows, split)
    )
    return fill_targets(frame, run.config.prompts.refusal, asking)


def _own_answers(run: Context, asked: pd.DataFrame, split: str) -> pd.DataFrame:
    """The model's own answers. They are a separate stage, so that another refusal text asks for none of them again."""
    name, tokens = f"{OWN_ANSWERS}/{split}", run.config.prompts.own_answer_tokens
    inputs = {
        "prompts": frame_hash(asked[["id", "messages"]]),
        "prompts.own_answer_tokens": tokens,
        **run.checkpoint,
        **run.numerics(run.config.evaluate.gpus_per_actor),
    }

    def work(folder: Folder) -> dict[str, Any]:
        answers = answered(run, asked, f"{name}/{PARTS}", f"own answers, {split}", max_new_tokens=tokens)
        folder.write_table(ANSWERS, answers[["id", "answer", "ended"]])
        return {"answers": len(answers)}

    return run.do(Stage(name=name, inputs=inputs, work=work)).folder.read_frame(ANSWERS)
