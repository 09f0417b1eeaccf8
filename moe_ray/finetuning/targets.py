"""Targets: the answer that each example is trained and scored towards, where its source gives none.

`fill_targets` and `held_out_to_ask` are what a run does, whoever asks the model; `with_targets` asks one in memory.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moe_ray.config.capture import CaptureConfig
from moe_ray.config.evaluate import EvaluateConfig
from moe_ray.config.prompts import PromptsConfig
from moe_ray.errors import InputError
from moe_ray.models.generation import generate_answers
from moe_ray.models.loading import context_length
from moe_ray.models.token_budget import TokenBudget
from moe_ray.models.tokenization import encode_prompt
from moe_ray.prompts.batches import Assembly, Batch
from moe_ray.prompts.example_tables import examples_to_frame
from moe_ray.prompts.examples import Example
from moe_ray.prompts.prompt_set import Prompts
from moe_ray.prompts.quarantine import Rejected
from moe_ray.routing.capture import evaluating
from moe_ray.routing.encode_example import unanswerable

logger = logging.getLogger(__name__)

TARGETS = ("target", "target_complete")
"""The columns that are filled."""


@dataclass(frozen=True, kw_only=True)
class Asking:
    """A model that can be asked.

    Attributes:
        unaskable: rows to those that the model cannot be asked, by the frame's index, see `unanswerable`.
        answers: rows to their own answers, in the same order: `answer` and `ended`.
    """

    unaskable: Callable[[pd.DataFrame], Mapping[Any, Rejected]]
    answers: Callable[[pd.DataFrame], pd.DataFrame]


def fill_targets(frame: pd.DataFrame, refusal: str, asking: Asking | None) -> pd.DataFrame:
    """The rows with missing targets filled: the refusal for unsafe ones, the model's own answer for safe ones.

    Args:
        frame: examples, a row each.
        refusal: `prompts.refusal`.
        asking: of the base model; None leaves safe rows without a target.
    """
    frame = frame.assign(target=frame["target"].astype(object))
    missing = frame["target"].isna()
    frame.loc[missing & (frame["label"] == "unsafe"), "target"] = refusal
    if asking is None:
        return frame
    asked = frame[missing & (frame["label"] == "safe")]
    # One that cannot be asked stays without a target; the capture sets it aside, or counts the part that fits.
    asked = asked.drop(index=list(asking.unaskable(asked)))
    if len(asked):
        answers = asking.answers(asked)
        frame.loc[asked.index, "target"] = answers["answer"].to_numpy()
        frame.loc[asked.index, "target_complete"] = answers["ended"].to_numpy()
    return frame


def held_out_to_ask(
    frame: pd.DataFrame, split: str, unaskable: Mapping[Any, Rejected], *, max_bad_share: float
) -> tuple[pd.DataFrame, list[dict[str, Any]]]:
    """The held-out examples that can be answered, and those left out: `split, id, label, category, reason, detail`.

    Args:
        frame: held-out examples of one split, a row each.
        split: its name.
        unaskable: those that the model cannot be asked, by the frame's index.
        max_bad_share: `capture.max_bad_share`.

    Raises:
        InputError: more than that share of them cannot.
    """
    left_out = left_out_rows(frame, split, unaskable)
    check_left_out(left_out, len(frame), split, max_bad_share=max_bad_share)
    return frame.drop(index=list(unaskable)), left_out


def left_out_rows(frame: pd.DataFrame, split: str, unaskable: Mapping[Any, Rejected]) -> list[dict[str, Any]]:
    """Rows `split, id, label, category, reason, detail` of the held-out examples that cannot be answered.

    Args:
        frame: held-out examples of one split, a row each.
        split: its name.
        unaskable: those that the model cannot be asked, by the frame's index.
    """
    found: list[dict[str, Any]] = []
    for index, why in unaskable.items():
        row = {name: frame.loc[index, name] for name in ("id", "label", "category")}
        found.append({"split": split, **row, "reason": why.reason, "detail": why.detail})
    return found


def check_left_out(
    left_out: Sequence[Mapping[str, Any]], num_examples: int, split: str, *, max_bad_share: float
) -> None:
    """Warns of held-out examples that are left out.

    Args:
        left_out: from `left_out_rows`.
        num_examples: held-out examples of the split.
        split: its name.
        max_bad_share: `capture.max_bad_share`.

    Raises:
        InputError: they are more than that share.
    """
    if len(left_out) > max_bad_share * num_examples:
        first = left_out[0]
        raise InputError(
            f"{len(left_out)} of {num_examples} {split} examples cannot be answered, expected at most a share of "
            f"{max_bad_share:g}; the first is {first['id']!r} ({first['reason']}: {first['detail']}); mend or remove "
            "them, or raise capture.max_bad_share"
        )
    if left_out:
        names = ", ".join(repr(row["id"]) for row in left_out[:5])
        logger.warning(
            "%d of %d %s examples cannot be answered and are left out: %s", len(left_out), num_examples, split, names
        )


def with_targets(
    prompts: Prompts,
    config: PromptsConfig,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    capture: CaptureConfig | None = None,
) -> Prompts:
    """The prompts as a run prepares them: missing targets filled in, held-out examples that cannot be asked left out.

    Args:
        prompts: split and grouped.
        config: `refusal`, the target of unsafe examples, and `own_answer_tokens`.
        model: gives safe examples its own answer; None leaves them without a target, and leaves nothing out. A training
            example that the model cannot be asked stays in its batch, and the capture sets it aside.
        tokenizer: of the model.
        capture: `too_long` and `max_bad_share`; None = the defaults.

    Raises:
        InputError: more than `max_bad_share` of a split's held-out examples cannot be asked, or one is too long and
            `too_long` is `error`.
    """
    capture = capture or CaptureConfig()
    asking = None if model is None or tokenizer is None else _asking(model, tokenizer, config, capture)

    def filled_in(examples: Sequence[Example], frame: pd.DataFrame) -> tuple[Example, ...]:
        filled = fill_targets(frame, config.refusal, asking)
        targets = zip(examples, filled["target"], filled["target_complete"], strict=True)
        return tuple(
            replace(example, target=target, target_complete=bool(complete))
            if isinstance(target, str) and example.target is None
            else example
            for example, target, complete in targets
        )

    def held_out(examples: Sequence[Example], split: str) -> tuple[Example, ...]:
        if not examples:
            return ()
        frame = examples_to_frame(examples)
        if asking is not None:
            frame, _ = held_out_to_ask(frame, split, asking.unaskable(frame), max_bad_share=capture.max_bad_share)
        return filled_in([examples[position] for position in frame.index], frame)

    test, validation = held_out(prompts.test, "test"), held_out(prompts.validation, "validation")
    used = [example for batch in prompts.batches for example in batch.examples]
    trained = iter(filled_in(used, examples_to_frame(used)))
    batches = tuple(replace(batch, examples=tuple(next(trained) for _ in batch.examples)) for batch in prompts.batches)
    return replace(
        prompts,
        assembly=Assembly(batches=batches, left_over=prompts.assembly.left_over),
        validation=validation,
        test=test,
    )


def without_unaskable(
    batches: Sequence[Batch], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> tuple[Batch, ...]:
    """The batches without the examples that the model cannot be asked, which a run's capture sets aside by default."""
    used = [example for batch in batches for example in batch.examples]
    if not used:
        return tuple(batches)
    frame = examples_to_frame(used)
    bad = set(unanswerable(frame, tokenizer, limit=context_length(model)))
    if not bad:
        return tuple(batches)
    names = ", ".join(repr(used[position].id) for position in sorted(bad)[:5])
    logger.warning("%d of %d examples cannot be asked and are not trained: %s", len(bad), len(used), names)
    positions = iter(range(len(used)))
    return tuple(
        replace(batch, examples=tuple(example for example in batch.examples if next(positions) not in bad))
        for batch in batches
    )


def _asking(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: PromptsConfig, capture: CaptureConfig
) -> Asking:
    """The model in memory."""

    def unaskable(rows: pd.DataFrame) -> dict[Any, Rejected]:
        return unanswerable(rows, tokenizer, limit=context_length(model), too_long=capture.too_long)

    def answers(rows: pd.DataFrame) -> pd.DataFrame:
        with evaluating(model):
            said = generate_answers(
                model,
                tokenizer,
                [encode_prompt(tokenizer, json.loads(text), after_thought=True) for text in rows["messages"]],
                max_new_tokens=config.own_answer_tokens,
                budget=TokenBudget(EvaluateConfig().tokens_per_forward),
            )
        return pd.DataFrame({"answer": [one.text for one in said], "ended": [one.ended for one in said]})

    return Asking(unaskable=unaskable, answers=answers)
