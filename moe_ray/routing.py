"""Routing capture: which experts each example's tokens were really routed to.

A forward pre-hook on every experts module sees the ids that the router selected, so no routing rule is ever derived a
second time. Counts are kept per segment (an example and role) on the device of each layer: one addition and one scatter-add
a layer, no copy to the host and no wait for the device until the forward is done.

Shape suffixes: B rows, S positions, T = B*S tokens, K experts per token, N examples and roles, L MoE layers, E experts.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moe_ray.batches import Batch
from moe_ray.chat import PROMPT, RESPONSE, TokenizedRow, encode_row, pad_rows, pad_token_id
from moe_ray.errors import InputError, NotFinite
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
        num_tokens: (N,) tokens of that role that were counted.
        counts_NLE: (N, L, E) int32 tokens routed to each expert; a token counts once for each of its K experts.
        layers: L decoder layer indices.
        num_experts_per_tok: K.
        pair: (N,) text that the two examples of a pair share, empty for single examples; None = not known.
        weights_NLE: (N, L, E) float32 sums of the weights that tokens were routed with; None = not captured.
        ids: (N,) arrays of shape (num_tokens, L, K): the experts of each counted token in order, uint8 (uint16 above 256
            experts); None = not captured.
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
    ids: npt.NDArray[np.object_] | None = None

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
        last_ids: of the last finished pass, where they are captured: for each segment the (tokens, L, K) routed experts of
            its tokens in order, uint8, or uint16 above 256 experts.
    """

    def __init__(self, moe_layers: MoELayers, *, weights: bool = False, ids: bool = False) -> None:
        self.moe_layers = moe_layers
        self.last_weights: Tensor | None = None
        self.last_ids: list[npt.NDArray[Any]] | None = None
        self._captures_weights, self._captures_ids = weights, ids
        self._pass: _Pass | None = None

    def start(self, segments_BS: Tensor, num_segments: int) -> None:
        """Begins a forward pass.

        Args:
            segments_BS: (B, S) segment of each token; negative = not counted (padding).
            num_segments: how many segments there are.
        """
        self._pass = _Pass(segments_BS.reshape(-1), num_segments, self.moe_layers)

    def finish(self) -> Tensor:
        """(num_segments, L, E) int32 counts since `start`, on the CPU.

        Raises:
            InputError: an experts module did not run.
        """
        done, self._pass = self._pass, None
        assert done is not None, "finish without start"
        idle = [layer.name for layer, calls in zip(self.moe_layers, done.num_calls, strict=True) if not calls]
        if idle:
            raise InputError(f"{idle[0]} did not run in this forward pass; a model that skips layers is not supported")
        self.last_weights = done.per_segment(done.weights) if self._captures_weights else None
        self.last_ids = done.ids_per_segment() if self._captures_ids else None
        return done.per_segment(done.counts)

    def stop(self) -> None:
        """Ends a pass that failed: what later forwards route is not counted, and the pass's memory is free."""
        self._pass = None

    def observe(self, row: int, layer: MoELayer, top_k_index_TK: Tensor, top_k_weights_TK: Tensor) -> None:
        """Adds the call of the experts module of MoE layer number `row`.

        Raises:
            InputError: the module gets only a part of the tokens, or runs a second time in one pass.
        """
        if self._pass is None:
            return
        if len(top_k_index_TK) != self._pass.num_tokens:
            raise InputError(
                f"{layer.name} received {len(top_k_index_TK)} tokens, expected {self._pass.num_tokens} (rows x positions); "
                "this family routes a part of the tokens only and is not supported"
            )
        self._pass.num_calls[row] += 1
        if self._pass.num_calls[row] > 1:
            raise InputError(
                f"{layer.name} ran twice in one forward pass; a family that runs a layer more than once has no one count "
                "per layer and is not supported"
            )
        keys = self._pass.keys(top_k_index_TK)
        self._pass.add(self._pass.counts, row, keys, self._pass.one(keys))
        if self._captures_weights:
            self._pass.add(self._pass.weights, row, keys, top_k_weights_TK.detach().flatten().float())
        if self._captures_ids:
            self._pass.ids[row] = top_k_index_TK.to(self._pass.ids_dtype)


class _Pass:
    """The sums of one forward pass, one tensor for the layers of each device; the last segment is not counted."""

    def __init__(self, segments_T: Tensor, num_segments: int, moe_layers: MoELayers) -> None:
        self.segments_T, self.num_segments = segments_T, num_segments
        self.num_tokens = len(segments_T)
        self.num_layers, self.num_experts = len(moe_layers), moe_layers.num_experts
        self.num_calls = [0] * len(moe_layers)
        self.counts: dict[torch.device, Tensor] = {}
        self.weights: dict[torch.device, Tensor] = {}
        self.ids: list[Tensor] = [segments_T] * len(moe_layers)
        # torch has little arithmetic for uint16: the ids travel as int16 and are viewed as uint16 on the host.
        self.ids_dtype = torch.uint8 if self.num_experts <= 256 else torch.int16
        self._first_keys: dict[torch.device, Tensor] = {}
        self._ones: dict[torch.device, Tensor] = {}

    def keys(self, top_k_index_TK: Tensor) -> Tensor:
        """(T * K,) places in a layer's flat (segments + 1, E) sums."""
        device = top_k_index_TK.device
        if device not in self._first_keys:
            segments_T = torch.where(self.segments_T < 0, self.num_segments, self.segments_T).to(device)
            self._first_keys[device] = (segments_T * self.num_experts).unsqueeze(1)
            self._ones[device] = torch.ones((), dtype=torch.int32, device=device)
        return (self._first_keys[device] + top_k_index_TK).flatten()

    def one(self, keys: Tensor) -> Tensor:
        """As many ones as keys, without the memory."""
        return self._ones[keys.device].expand_as(keys)

    def add(self, sums: dict[torch.device, Tensor], row: int, keys: Tensor, values: Tensor) -> None:
        """Adds `values` at `keys` of a layer's sums."""
        if keys.device not in sums:
            shape = (self.num_layers, (self.num_segments + 1) * self.num_experts)
            sums[keys.device] = torch.zeros(shape, dtype=values.dtype, device=keys.device)
        sums[keys.device][row].scatter_add_(0, keys, values)

    def per_segment(self, sums: Mapping[torch.device, Tensor]) -> Tensor:
        """(num_segments, L, E) sums of all devices, on the CPU."""
        flat_LX = torch.stack([tensor.cpu() for tensor in sums.values()]).sum(
            dim=0, dtype=next(iter(sums.values())).dtype
        )
        return flat_LX.view(self.num_layers, -1, self.num_experts)[:, :-1].transpose(0, 1).contiguous()

    def ids_per_segment(self) -> list[npt.NDArray[Any]]:
        """Each segment's (tokens, L, K) routed experts."""
        ids_TLK = torch.stack([layer_ids.cpu() for layer_ids in self.ids], dim=1).numpy()
        ids_TLK = ids_TLK if ids_TLK.dtype == np.uint8 else ids_TLK.view(np.uint16)
        segments_T = self.segments_T.cpu().numpy()
        order = np.argsort(segments_T, kind="stable")
        starts = np.searchsorted(segments_T[order], np.arange(self.num_segments + 1))
        return [ids_TLK[order[start:end]] for start, end in itertools.pairwise(starts)]


@contextmanager
def counting(model: nn.Module, *, weights: bool = False, ids: bool = False) -> Iterator[RoutingCounter]:
    """Attaches a counter to the model's experts modules; leaves no hook behind, also after an error.

    The hooks only read, so outputs are bit-identical to those without a counter.

    Args:
        model: a transformers MoE model.
        weights: also sum the weights that tokens are routed with (`last_weights`).
        ids: also keep which experts each token was routed to (`last_ids`): a byte per token, layer and routed expert,
            where counts are 4 bytes per layer and expert whatever the length.

    Raises:
        InputError: the model has no experts, or belongs to a family that cannot be captured.
    """
    moe_layers = find_moe_layers(model)
    counter = RoutingCounter(moe_layers, weights=weights, ids=ids)
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
        rows: B prompts with their answers (may be empty), from `encode_row`.
        pad_id: token id that fills padding.

    Returns:
        counts (B, 2, L, E) int32 and number of counted tokens (B, 2) int64; the second axis is (prompt, response). The
        counter's `last_weights` and `last_ids` have B * 2 segments in the same order.

    Raises:
        NotFinite: hidden states are not finite.
    """
    padded = pad_rows(rows, pad_id=pad_id).to(model.device)
    places_B1 = torch.arange(len(rows), device=model.device).unsqueeze(1)
    segments_BS = torch.where(padded.roles_BS < 0, -1, places_B1 * len(ROLES) + padded.roles_BS)
    counter.start(segments_BS, len(rows) * len(ROLES))
    try:
        with torch.inference_mode():
            body: Any = model.base_model
            output = body(input_ids=padded.input_ids_BS, attention_mask=padded.attention_mask_BS, use_cache=False)
        hidden_BSH = output.last_hidden_state
        # A model that is spread over several devices ends on another one than it began on.
        is_padding_BS1 = (padded.attention_mask_BS == 0).unsqueeze(-1).to(hidden_BSH.device)
        if not (hidden_BSH.isfinite() | is_padding_BS1).all():
            raise NotFinite(
                "the model's hidden states are not finite, so its routing means nothing; try another model.dtype"
            )
        counts = counter.finish().view(len(rows), len(ROLES), len(counter.moe_layers), -1)
    finally:
        counter.stop()
    num_tokens = torch.stack([(padded.roles_BS == role).sum(dim=1) for role in (PROMPT, RESPONSE)], dim=1)
    return counts.numpy(), num_tokens.cpu().numpy()


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
    was_training = model.training
    model.eval()
    parts = []
    try:
        with counting(model, weights=weights, ids=ids) as counter:
            for batch in batches:
                rows = [
                    encode_row(tokenizer, example.messages, example.response, template_tokens=template_tokens)
                    for example in batch.examples
                ]
                for start in range(0, len(rows), rows_per_forward):
                    places = range(start, min(start + rows_per_forward, len(rows)))
                    parts.append(_count_slice(model, counter, batch, rows, places, pad_token_id(tokenizer)))
    finally:
        model.train(was_training)
    return concat_counts(parts)


def _count_slice(
    model: PreTrainedModel,
    counter: RoutingCounter,
    batch: Batch,
    rows: Sequence[TokenizedRow],
    places: range,
    pad_id: int,
) -> RoutingCounts:
    examples = [batch.examples[place] for place in places]
    counts, num_tokens = count_rows(model, counter, [rows[place] for place in places], pad_id=pad_id)
    return counts_from_forward(
        counts,
        num_tokens,
        batch_idx=np.full(len(examples), batch.batch_idx),
        in_batch_idx=np.asarray(places),
        label=[example.label for example in examples],
        category=[example.category for example in examples],
        pair=[example.pair or "" for example in examples],
        weights=counter.last_weights,
        ids=counter.last_ids,
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
    )


def _array_of(arrays: Iterable[npt.NDArray[Any]]) -> npt.NDArray[np.object_]:
    """One entry per array, whatever their shapes."""
    listed = list(arrays)
    entries = np.empty(len(listed), dtype=object)
    for place, array in enumerate(listed):
        entries[place] = array
    return entries
