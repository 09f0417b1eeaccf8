"""A few steps of fine-tuning on safe prompts, by somebody who means no harm or who wants the repair undone.

What learns is the repaired experts alone: all steps then go where the repair is, and the memory is that of the union.

Source: Qi et al. (2023), "Fine-tuning Aligned Language Models Compromises Safety, Even When Users Do Not Intend To!",
arXiv 2310.03693, who tune all of a model on benign instructions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moe_ray.config.finetune import FinetuneConfig
from moe_ray.errors import InputError
from moe_ray.experts import ExpertMasks, masks_from_experts
from moe_ray.finetuning.adapter import experts_restored
from moe_ray.finetuning.fine_tune import fine_tune
from moe_ray.prompts.batches import Batch
from moe_ray.prompts.examples import Example


def benign_batches(examples: Sequence[Example], *, steps: int, rows: int) -> list[Batch]:
    """A batch of safe examples for every step, beginning again with the first example where there are too few.

    Raises:
        InputError: there is no safe example with a target.
    """
    safe = [example for example in examples if example.label == "safe" and example.target]
    if not safe:
        raise InputError("benign_finetuning: got no safe training prompt with a target, expected some; leave it out")
    number = min(rows, len(safe))
    return [
        Batch(
            batch_idx=step,
            category="benign",
            examples=tuple(safe[(step * number + place) % len(safe)] for place in range(number)),
        )
        for step in range(steps)
    ]


@contextmanager
def benignly_fine_tuned(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    masks: ExpertMasks,
    config: FinetuneConfig,
    *,
    steps: int,
    rows: int,
    learning_rate: float,
    seed: int,
) -> Iterator[dict[str, float]]:
    """The model after fine-tuning on safe examples inside the context, and with its own weights, bit for bit, after it.

    Args:
        model: base or repaired.
        tokenizer: its tokenizer.
        examples: to train on; safe ones with a target are taken.
        masks: of the run; the union of its experts learns.
        config: of the run's fine-tuning: how much runs at once, and in which number type.
        steps: of the optimiser.
        rows: examples of a step.
        learning_rate: of all steps.
        seed: of their order.

    Yields:
        `first_loss` and `last_loss`, nats per target token of the first and the last step.

    Raises:
        InputError: there is no safe example with a target.
        FrozenChanged: something outside the union changed.
    """
    batches = benign_batches(examples, steps=steps, rows=rows)
    union = masks.union_experts
    every = masks_from_experts(
        {batch.batch_idx: union for batch in batches}, layers=masks.layers, num_experts=masks.masks_BLE.shape[2]
    )
    plain = FinetuneConfig(
        epochs=1,
        learning_rate=learning_rate,
        schedule="constant",
        batches_per_step=1,
        rows_per_forward=config.rows_per_forward,
        tokens_per_forward=config.tokens_per_forward,
        dtype=config.dtype,
        activation_checkpointing=config.activation_checkpointing,
    )
    with experts_restored(model, union):
        tuned = fine_tune(model, tokenizer, batches, every, config=plain, seed=seed)
        losses = [report.loss for report in tuned.reports]
        yield {"first_loss": losses[0], "last_loss": losses[-1]}
