"""Targets: the answer that each example is trained and scored towards, where its source gives none."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moe_ray.config.evaluate import EvaluateConfig
from moe_ray.config.prompts import PromptsConfig
from moe_ray.models.generation import generate_answers
from moe_ray.models.loading import context_length
from moe_ray.models.tokenization import encode_prompt
from moe_ray.prompts.batches import Assembly
from moe_ray.prompts.example_tables import examples_to_frame
from moe_ray.prompts.examples import Example
from moe_ray.prompts.prompt_set import Prompts
from moe_ray.routing.capture import evaluating
from moe_ray.routing.encode_example import unanswerable

logger = logging.getLogger(__name__)


def with_targets(
    prompts: Prompts,
    config: PromptsConfig,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Prompts:
    """The prompts with the missing targets filled in.

    Args:
        prompts: split and grouped.
        config: `refusal`, the target of unsafe examples, and `own_answer_tokens`.
        model: gives safe examples its own answer; None leaves them without a target. With a model, examples that it cannot
            be asked (too long, or refused by the chat template) are left out and named in a warning.
        tokenizer: of the model.
    """
    used = [example for batch in prompts.batches for example in batch.examples]
    held_out = [*prompts.validation, *prompts.test]
    targets = {example.id: config.refusal for example in used + held_out if example.label == "unsafe"}
    complete = dict.fromkeys(targets, True)
    unasked: set[str] = set()
    if model is not None and tokenizer is not None:
        frame = examples_to_frame(used + held_out)
        bad = unanswerable(frame, tokenizer, limit=context_length(model))
        unasked = {frame.loc[position, "id"] for position in bad}
        asked = [e for e in used + held_out if e.label == "safe" and e.target is None and e.id not in unasked]
        answers = _own_answers(model, tokenizer, asked, config.own_answer_tokens)
        targets |= {example.id: text for example, (text, _) in zip(asked, answers, strict=True)}
        complete |= {example.id: ended for example, (_, ended) in zip(asked, answers, strict=True)}

        if unasked:
            names = ", ".join(sorted(unasked)[:5])
            logger.warning("%d examples cannot be asked and are left out: %s", len(unasked), names)

    def finished(examples: Sequence[Example]) -> tuple[Example, ...]:
        return tuple(
            replace(example, target=targets[example.id], target_complete=complete[example.id])
            if example.target is None and example.id in targets
            else example
            for example in examples
            if example.id not in unasked
        )

    batches = tuple(replace(batch, examples=finished(batch.examples)) for batch in prompts.batches)
    return replace(
        prompts,
        assembly=Assembly(batches=batches, left_over=prompts.assembly.left_over),
        validation=finished(prompts.validation),
        test=finished(prompts.test),
    )


def _own_answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], max_new_tokens: int
) -> list[tuple[str, bool]]:
    """The model's answer to each example, and whether it ended by itself."""
    with evaluating(model):
        return generate_answers(
            model,
            tokenizer,
            [encode_prompt(tokenizer, example.messages) for example in examples],
            max_new_tokens=max_new_tokens,
            rows_per_forward=EvaluateConfig().rows_per_forward,
        )
