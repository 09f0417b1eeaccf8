"""Routing capture: which experts each example's tokens were really routed to.

A forward pre-hook on every experts module sees the ids that the router selected, so no routing rule is ever derived a
second time. Counts are kept per segment (an example and role) on the model's device: one scatter-add a layer, no copy to
the host until the forward is done.

Shape suffixes: B rows, S positions, T = B*S tokens, K experts per token, N examples and roles, L MoE layers, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moe_ray.batches import Batch
from moe_ray.chat import PROMPT, RESPONSE, TokenizedRow, encode_answer, encode_prompt, pad_rows, pad_token_id
from moe_ray.errors import InputError
from moe_ray.moe_layers import MoELayer, MoELayers, find_moe_layers, routing_of_call, uncompiled

ROLES = ("prompt", "response")


@dataclass(frozen=True, kw_only=True)
class RoutingCounts:
    """Routed tokens per example and role.

    Attributes:
        batch_idx: (N,) batch of the example.
        in_batch_idx: (N,) its place there.
        label: (N,) `safe` or `unsafe`.
        category: (N,) text, may be empty.
        role: (N,) `prompt` or `response`.
        num_tokens: (N,) tokens of that role.
        counts_NLE: (N, L, E) int32 tokens routed to each expert; a token counts once for each of its K experts.
        layers: L decoder layer indices.
        num_experts_per_tok: K.
        pair: (N,) text that the two examples of a pair share, empty for single examples; None = not known.
        weights_NLE: (N, L, E) float32 sums of the weights that tokens were routed with; None = not captured.
    """

    batch_idx: npt.NDArray[np.int64]
    in_batch_idx: npt.NDArray[np.int64]
    label: npt.NDArray[np.object_]
    category: npt.NDArray[np.object_]
    role: npt.NDArray[np.object_]
    num_tokens: npt.NDArray[np.int64]
    counts_NLE: npt.NDArray[np.int32]
    layers: tuple[int, ...]
    num_experts_per_tok: int
    pair: npt.NDArray[np.object_] | None = None
    weights_NLE: npt.NDArray[np.float32] | None = None

    def __len__(self) -> int:
        return len(self.batch_idx)

    def take(self, rows: npt.NDArray[Any]) -> RoutingCounts:
        """The given rows: an index array or a boolean mask, shape (N,)."""
        kept = {name: values[rows] for name, values in self.per_row().items()}
        return RoutingCounts(**kept, layers=self.layers, num_experts_per_tok=self.num_experts_per_tok)

    def per_row(self) -> dict[str, npt.NDArray[Any]]:
        """The arrays with one entry per row that are there, by name."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _NOT_PER_ROW}
        return {name: array for name, array in values.items() if array is not None}

    def check(self) -> None:
        """Each layer's counts of a row sum to its `num_tokens * num_experts_per_tok`.

        Raises:
            InputError: they do not; the counts are damaged or come from another model.
        """
        sums_NL = self.counts_NLE.sum(axis=2, dtype=np.int64)
        wrong = np.argwhere(sums_NL != (self.num_tokens * self.num_experts_per_tok)[:, None])
        if len(wrong):
            row, layer = wrong[0]
            raise InputError(
                f"routing counts of batch {self.batch_idx[row]}, example {self.in_batch_idx[row]}, layer "
                f"{self.layers[layer]}: got a sum of {sums_NL[row, layer]}, expected {self.num_tokens[row]} tokens x "
                f"{self.num_experts_per_tok} experts; capture them again"
            )


_NOT_PER_ROW = ("layers", "num_experts_per_tok")


def concat_counts(parts: Sequence[RoutingCounts]) -> RoutingCounts:
    """All rows of all parts, ordered by batch, place and role.

    Raises:
        InputError: there are no parts, or they come from different models.
    """
    if not parts:
        raise InputError("no routing counts; capture at least one batch")
    if len({(part.layers, part.counts_NLE.shape[1:], part.num_experts_per_tok) for part in parts}) > 1:
        raise InputError("routing counts of different models cannot be joined; capture all batches with one model")
    rows = [part.per_row() for part in parts]
    names = set.intersection(*(set(part) for part in rows))
    joined = {name: np.concatenate([part[name] for part in rows]) for name in names}
    order = np.lexsort((joined["role"].astype(str), joined["in_batch_idx"], joined["batch_idx"]))
    joined = {name: values[order] for name, values in joined.items()}
    return RoutingCounts(**joined, layers=parts[0].layers, num_experts_per_tok=parts[0].num_experts_per_tok)


class RoutingCounter:
    """Counts routed tokens while `counting` is active.

    Attributes:
        moe_layers: of the model.
        last_weights: (segments, L, E) float32 routed weight sums of the last finished pass, where they are captured.
    """

    def __init__(self, moe_layers: MoELayers, *, weights: bool = False) -> None:
        self.moe_layers = moe_layers
        self.last_weights: Tensor | None = None
        self._captures_weights = weights
        self._segments_T: Tensor | None = None
        self._counts: list[Tensor] = []
        self._weights: list[Tensor] = []

    def start(self, segments_BS: Tensor, num_segments: int) -> None:
        """Begins a forward pass.

        Args:
            segments_BS: (B, S) segment of each token; negative = not counted (padding).
            num_segments: how many segments there are.
        """
        flat_T = segments_BS.reshape(-1)
        self._segments_T = torch.where(flat_T < 0, num_segments, flat_T)
        size = (num_segments + 1) * self.moe_layers.num_experts
        self._counts = [torch.zeros(size, dtype=torch.int32, device=flat_T.device) for _ in self.moe_layers]
        kept = self.moe_layers if self._captures_weights else ()
        self._weights = [torch.zeros(size, dtype=torch.float32, device=flat_T.device) for _ in kept]

    def finish(self) -> Tensor:
        """(num_segments, L, E) int32 counts since `start`, on the CPU."""
        counts = self._per_segment(self._counts)
        self.last_weights = self._per_segment(self._weights) if self._weights else None
        self._segments_T, self._counts, self._weights = None, [], []
        return counts

    def _per_segment(self, sums: Sequence[Tensor]) -> Tensor:
        """(num_segments, L, E) of one flat tensor per layer; the last segment, which is not counted, is left out."""
        return torch.stack([flat.view(-1, self.moe_layers.num_experts)[:-1].cpu() for flat in sums], dim=1)

    def observe(self, row: int, layer: MoELayer, top_k_index_TK: Tensor, top_k_weights_TK: Tensor) -> None:
        """Adds one call of the experts module of MoE layer number `row`."""
        if self._segments_T is None:
            return
        if len(top_k_index_TK) != len(self._segments_T):
            raise InputError(
                f"{layer.name} received {len(top_k_index_TK)} tokens, expected {len(self._segments_T)} (rows x positions); "
                "this family routes a part of the tokens only and is not supported"
            )
        counts = self._counts[row]
        segments_T1 = self._segments_T.to(top_k_index_TK.device).unsqueeze(1)
        keys = (segments_T1 * layer.num_experts + top_k_index_TK).flatten()
        if keys.device != counts.device:
            counts = self._counts[row] = counts.to(keys.device)
        counts.scatter_add_(0, keys, torch.ones_like(keys, dtype=torch.int32))
        if self._weights:
            self._weights[row] = self._weights[row].to(keys.device)
            self._weights[row].scatter_add_(0, keys, top_k_weights_TK.detach().flatten().float())


@contextmanager
def counting(model: nn.Module, *, weights: bool = False) -> Iterator[RoutingCounter]:
    """Attaches a counter to the model's experts modules; leaves no hook behind, also after an error.

    The hooks only read, so outputs are bit-identical to those without a counter. With `weights` it also sums the weights
    that tokens are routed with.
    """
    moe_layers = find_moe_layers(model)
    counter = RoutingCounter(moe_layers, weights=weights)
    handles = []

    def make_hook(row: int, layer: MoELayer) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            counter.observe(row, layer, *routing_of_call(layer, args, dict(kwargs))[1:])

        return hook

    try:
        for row, layer in enumerate(moe_layers):
            handles.append(layer.experts.register_forward_pre_hook(make_hook(row, layer), with_kwargs=True))
        with uncompiled():
            yield counter
    finally:
        for handle in handles:
            handle.remove()


def count_rows(
    model: PreTrainedModel, counter: RoutingCounter, rows: Sequence[TokenizedRow], *, pad_id: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    """Routing counts of one forward pass over `rows`, without the language-model head.

    Args:
        model: a causal language model, in eval mode.
        counter: attached to it by `counting`.
        rows: B prompts with their answers (may be empty).
        pad_id: token id that fills padding.

    Returns:
        counts (B, 2, L, E) int32 and number of tokens (B, 2) int64; the second axis is (prompt, response).

    Raises:
        InputError: hidden states are not finite.
    """
    padded = pad_rows(rows, pad_id=pad_id).to(model.device)
    places_B1 = torch.arange(len(rows), device=model.device).unsqueeze(1)
    segments_BS = torch.where(padded.roles_BS < 0, -1, places_B1 * len(ROLES) + padded.roles_BS)
    counter.start(segments_BS, len(rows) * len(ROLES))
    with torch.inference_mode():
        body: Any = model.base_model
        output = body(input_ids=padded.input_ids_BS, attention_mask=padded.attention_mask_BS, use_cache=False)
    if not output.last_hidden_state[padded.attention_mask_BS == 1].isfinite().all():
        raise InputError(
            "the model's hidden states are not finite, so its routing means nothing; try another model.dtype"
        )
    counts = counter.finish().view(len(rows), len(ROLES), len(counter.moe_layers), -1)
    num_tokens = torch.stack([(padded.roles_BS == role).sum(dim=1) for role in (PROMPT, RESPONSE)], dim=1)
    return counts.numpy(), num_tokens.cpu().numpy()


def count_batches(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batches: Sequence[Batch],
    *,
    rows_per_forward: int = 32,
    weights: bool = False,
) -> RoutingCounts:
    """Routing counts of every example of the batches: one row for its prompt, one for its response if it has one.

    Args:
        model: a causal language model; its training mode is restored afterwards.
        tokenizer: its tokenizer; the chat template is applied where there is one.
        batches: from `assemble_batches`.
        rows_per_forward: examples in one forward pass; changes memory and speed, not the counts.
        weights: also sum the weights that tokens are routed with.

    Raises:
        InputError: the model has no experts, or belongs to a family that cannot be captured.
    """
    was_training = model.training
    model.eval()
    parts = []
    try:
        with counting(model, weights=weights) as counter:
            for batch in batches:
                for start in range(0, len(batch.examples), rows_per_forward):
                    parts.append(_count_slice(model, tokenizer, counter, batch, start, rows_per_forward))
    finally:
        model.train(was_training)
    return concat_counts(parts)


def _count_slice(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    counter: RoutingCounter,
    batch: Batch,
    start: int,
    size: int,
) -> RoutingCounts:
    examples = batch.examples[start : start + size]
    rows = [
        TokenizedRow(
            encode_prompt(tokenizer, example.messages),
            encode_answer(tokenizer, example.response) if example.response else [],
        )
        for example in examples
    ]
    counts, num_tokens = count_rows(model, counter, rows, pad_id=pad_token_id(tokenizer))
    return counts_from_forward(
        counts,
        num_tokens,
        batch_idx=np.full(len(examples), batch.batch_idx),
        in_batch_idx=np.arange(start, start + len(examples)),
        label=[example.label for example in examples],
        category=[example.category for example in examples],
        pair=[example.pair or "" for example in examples],
        weights=counter.last_weights,
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
) -> RoutingCounts:
    """`RoutingCounts` of what `count_rows` returned: one row per example and role, roles without tokens left out.

    `weights` are the counter's `last_weights`.
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
    )
