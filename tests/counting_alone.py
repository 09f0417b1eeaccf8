"""Counts of one process, batch by batch and row by row as they come: what every other way of counting must give."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moe_ray.models.tokenization import encode_row, pad_token_id
from moe_ray.prompts.batches import Batch
from moe_ray.routing.capture import PlacedRow, count_placed, evaluating
from moe_ray.routing.counter import counting
from moe_ray.routing.counts import RoutingCounts, concat_counts


def count_batches(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batches: Sequence[Batch],
    *,
    rows_per_forward: int = 32,
    weights: bool = False,
    ids: bool = False,
    template_tokens: bool = True,
) -> RoutingCounts:
    """Routing counts of every example of the batches: one row for its prompt, one for its response if it has one.

    Args:
        model: a causal language model; its training mode is restored afterwards.
        tokenizer: its tokenizer; the chat template is applied where there is one.
        batches: from `assemble_batches`.
        rows_per_forward: examples in one forward pass; changes memory and speed, not the counts.
        weights: also sum the weights that tokens are routed with.
        ids: also keep which experts each token was routed to.
        template_tokens: count tokens of the chat template too; see `encode_row`.

    Raises:
        InputError: the model has no experts, or belongs to a family that cannot be captured; or as `encode_row`.
    """
    parts = []
    with evaluating(model), counting(model, weights=weights, ids=ids) as counter:
        for batch in batches:
            rows = [
                PlacedRow(batch.batch_idx, position, example, tokens)
                for position, example in enumerate(batch.examples)
                for tokens in [
                    encode_row(tokenizer, example.messages, example.response, template_tokens=template_tokens)
                ]
            ]
            for start in range(0, len(rows), rows_per_forward):
                parts.append(
                    count_placed(model, counter, rows[start : start + rows_per_forward], pad_token_id(tokenizer))
                )
    return concat_counts(parts)
