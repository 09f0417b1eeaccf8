"""Stage `prepare`: prompts to batches and held-out examples, with a target for each."""

from __future__ import annotations

import logging
from typing import Any

import pandas as pd

from moe_ray.errors import InputError
from moe_ray.evaluation.evaluate import assign_reference_batches
from moe_ray.evaluation.judges import judge_identity
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
from moe_ray.routing.encode_example import unanswerable
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

logger = logging.getLogger(__name__)

_PAIR_ANSWERS = f"{PAIRS}/answers"
_LEFT_OUT_COLUMNS = ("split", "id", "label", "category", "reason", "detail")
_TARGETS = ["target", "target_complete"]


def filter_pairs(run: Context) -> Outcome:
    """Finds which pairs are kept, and groups the run's prompts anew from those; does so only once in a run."""
    if PAIRS in run.outcomes:
        return run.outcomes[PAIRS]
    pairs = [example for example in run.prompts.examples if example.pair is not None]
    inputs = {
        "pairs": content_hash([example_to_row(example) for example in pairs]),
        "prompts.keep_pairs": run.config.prompts.keep_pairs,
        "evaluate.max_new_tokens": run.config.evaluate.max_new_tokens,
        "judge": judge_identity(run.config.evaluate),
        **run.checkpoint,
        **run.numerics(run.config.evaluate.gpus_per_actor),
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
    rows = [example_to_row(example) for batch in run.prompts.assembly.batches for example in batch.examples]
    rows += [example_to_row(example) for example in run.prompts.validation + run.prompts.test]
    inputs = {
        "examples": content_hash(rows),
        **run.settings("targets"),
        "capture.too_long": run.config.capture.too_long,
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
        frame = _without_unanswerable(run, examples_to_frame(examples), split, left_out)
        frame["batch_idx"] = assign_reference_batches(frame, train)
        frame = _with_targets(run, frame, split)
        folder.write_table(file, frame)
        made[split] = frame_hash(frame)
    # The capture does not read targets, so another refusal captures nothing again.
    made["examples"] = frame_hash(train.drop(columns=_TARGETS))
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


def _unanswerable(run: Context, frame: pd.DataFrame) -> dict[Any, Rejected]:
    """The rows that the model cannot be asked, each with the reason."""
    policy = run.config.capture.too_long
    return unanswerable(frame, load_tokenizer(run.model), limit=context_length(run.model), too_long=policy)


def _without_unanswerable(
    run: Context, frame: pd.DataFrame, split: str, left_out: list[dict[str, Any]]
) -> pd.DataFrame:
    """The held-out examples that can be answered; the others are listed in `left_out`.

    Raises:
        InputError: more than `capture.max_bad_share` of them cannot.
    """
    bad, share = _unanswerable(run, frame), run.config.capture.max_bad_share
    for index, why in bad.items():
        row = {name: frame.loc[index, name] for name in ("id", "label", "category")}
        left_out.append({"split": split, **row, "reason": why.reason, "detail": why.detail})
    if len(bad) > share * len(frame):
        first = left_out[-len(bad)]
        raise InputError(
            f"{len(bad)} of {len(frame)} {split} examples cannot be answered, expected at most a share of {share:g}; "
            f"the first is {first['id']!r} ({first['reason']}: {first['detail']}); mend or remove them, or raise "
            "capture.max_bad_share"
        )
    if bad:
        names = ", ".join(repr(row["id"]) for row in left_out[-len(bad) :][:5])
        logger.warning(
            "%d of %d %s examples cannot be answered and are left out: %s", len(bad), len(frame), split, names
        )
    return frame.drop(index=list(bad))


def _with_targets(run: Context, frame: pd.DataFrame, split: str) -> pd.DataFrame:
    """Fills missing targets: of an unsafe example the refusal, of a safe one the model's own answer."""
    frame = frame.assign(target=frame["target"].astype(object))
    missing = frame["target"].isna()
    frame.loc[missing & (frame["label"] == "unsafe"), "target"] = run.config.prompts.refusal
    asked = frame[missing & (frame["label"] == "safe")]
    # An example that the model cannot be asked stays without a target. The capture quarantines it, or counts the part of it
    # that fits.
    asked = asked.drop(index=list(_unanswerable(run, asked)))
    if len(asked):
        answers = _own_answers(run, asked, split)
        frame.loc[asked.index, "target"] = answers["answer"].to_numpy()
        frame.loc[asked.index, "target_complete"] = answers["ended"].to_numpy()
    return frame


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
