"""Routing capture: which experts each example's tokens were really routed to.

A forward pre-hook on every experts module sees the ids that the router selected, so no routing rule is ever derived a
second time. Counts are kept per segment (an example and role) on the device of each layer: one addition and one scatter-add
a layer, no copy to the host and no wait for the device until the forward is done.

Shape suffixes: B rows, S positions, T = B*S tokens, K experts per token, N examples and roles, L MoE layers, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import PreTrainedModel

from moe_ray.errors import NotFinite
from moe_ray.models.moe_layers import MoELayers
from moe_ray.models.tokenization import PROMPT, RESPONSE, THOUGHT, TokenizedRow, pad_rows
from moe_ray.prompts.examples import Example
from moe_ray.routing.counter import RoutingCounter
from moe_ray.routing.counts import ROLES, RoutingCounts

RowScores = Mapping[str, npt.NDArray[Any]]
"""By a name of `RoutingCounts` what is known of B rows: (B, 3, …), the second axis that of `ROLES`."""

ScoreRows = Callable[..., RowScores]
"""From B rows, with `labels` and `targets` of their examples, to their scores."""


class PlacedRow(NamedTuple):
    """An example with its stable ids and its token ids."""

    batch_idx: int
    in_batch_idx: int
    example: Example
    tokens: TokenizedRow


def count_rows(
    model: PreTrainedModel, counter: RoutingCounter, rows: Sequence[TokenizedRow], *, pad_id: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    """Routing counts of one forward pass over `rows`, without the language-model head.

    Args:
        model: a causal language model, in eval mode.
        counter: attached to it by `counting`.
        rows: B prompts with their answers (may be empty), from `encode_row`.
        pad_id: token id that fills padding.

    Returns:
        counts (B, 3, L, E) int32 and number of counted tokens (B, 3) int64; the second axis is that of `ROLES`. The
        counter's `last_weights` and `last_ids` have B * 3 segments in the same order.

    Raises:
        NotFinite: hidden states are not finite.
    """
    on_host = pad_rows(rows, pad_id=pad_id)
    num_tokens = torch.stack([(on_host.roles_BS == role).sum(dim=1) for role in (PROMPT, RESPONSE, THOUGHT)], dim=1)
    padded = on_host.to(model.device)
    rows_B1 = torch.arange(len(rows), device=model.device).unsqueeze(1)
    segments_BS = torch.where(padded.roles_BS < 0, -1, rows_B1 * len(ROLES) + padded.roles_BS)
    counter.start(segments_BS, len(rows) * len(ROLES))
    try:
        with torch.inference_mode():
            body: Any = model.base_model
            output = body(input_ids=padded.input_ids_BS, attention_mask=padded.attention_mask_BS, use_cache=False)
        hidden_BSH = output.last_hidden_state
        # A model that is spread over several devices ends on another one than it began on.
        is_padding_BS1 = (padded.attention_mask_BS == 0).unsqueeze(-1).to(hidden_BSH.device)
        is_finite = (hidden_BSH.isfinite() | is_padding_BS1).all()
        counts = counter.finish().view(len(rows), len(ROLES), len(counter.moe_layers), -1)
    finally:
        counter.stop()
    # Looked at after the counts have come, when the device has nothing left to do.
    if not is_finite:
        raise NotFinite(
            "the model's hidden states are not finite, so its routing means nothing; try another model.dtype"
        )
    return counts.numpy(), num_tokens.numpy()


def count_placed(
    model: PreTrainedModel,
    counter: RoutingCounter,
    rows: Sequence[PlacedRow],
    pad_id: int,
    score: ScoreRows | None = None,
) -> RoutingCounts:
    """The counts of one forward pass, and the scores of its rows."""
    tokens = [row.tokens for row in rows]
    counts, num_tokens = count_rows(model, counter, tokens, pad_id=pad_id)
    weights, ids = counter.last_weights, counter.last_ids
    labels, targets = [row.example.label for row in rows], [row.example.target for row in rows]
    return counts_from_forward(
        counts,
        num_tokens,
        batch_idx=[row.batch_idx for row in rows],
        in_batch_idx=[row.in_batch_idx for row in rows],
        label=labels,
        category=[row.example.category for row in rows],
        pair=[row.example.pair or "" for row in rows],
        weights=weights,
        ids=ids,
        scores={} if score is None else score(tokens, labels=labels, targets=targets),
        moe_layers=counter.moe_layers,
    )


def counts_from_forward(
    counts: npt.NDArray[np.int32],
    num_tokens: npt.NDArray[np.int64],
    *,
    batch_idx: npt.ArrayLike,
    in_batch_idx: npt.ArrayLike,
    label: Sequence[str],
    category: Sequence[str],
    moe_layers: MoELayers,
    pair: Sequence[str] | None = None,
    weights: Tensor | None = None,
    ids: Sequence[npt.NDArray[Any]] | None = None,
    scores: RowScores | None = None,
) -> RoutingCounts:
    """`RoutingCounts` of what `count_rows` returned: one row per example and role, roles without tokens left out.

    `weights` and `ids` are the counter's `last_weights` and `last_ids`.
    """
    rows, roles = np.nonzero(num_tokens)
    return RoutingCounts(
        batch_idx=np.asarray(batch_idx, dtype=np.int64)[rows],
        in_batch_idx=np.asarray(in_batch_idx, dtype=np.int64)[rows],
        label=np.asarray(label, dtype=object)[rows],
        category=np.asarray(category, dtype=object)[rows],
        role=np.asarray(ROLES, dtype=object)[roles],
        num_tokens=num_tokens[rows, roles].astype(np.int64),
        counts_NLE=counts[rows, roles],
        layers=moe_layers.layers,
        num_experts_per_tok=moe_layers.num_experts_per_tok,
        pair=None if pair is None else np.asarray(pair, dtype=object)[rows],
        weights_NLE=None if weights is None else weights.view(*counts.shape).numpy()[rows, roles],
        ids=None if ids is None else _array_of(ids[segment] for segment in (rows * len(ROLES) + roles).tolist()),
        **{name: values[rows, roles] for name, values in (scores or {}).items()},
    )


def _array_of(arrays: Iterable[npt.NDArray[Any]]) -> npt.NDArray[np.object_]:
    """One entry per array, whatever their shapes."""
    listed = list(arrays)
    entries = np.empty(len(listed), dtype=object)
    for position, array in enumerate(listed):
        entries[position] = array
    return entries


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Dropout and router noise are off meanwhile."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
