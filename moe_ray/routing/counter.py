"""The counter: hooks on a model's experts modules that count what was really routed."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from moe_ray.errors import InputError
from moe_ray.models.moe_layers import MoELayer, MoELayers, find_moe_layers, routing_of_call, uncompiled
from moe_ray.routing.layer_mask import COUNTS, has_mask


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

    def observe(
        self, row: int, layer: MoELayer, top_k_index_TK: Tensor, top_k_weights_TK: Tensor, *, is_masked: bool = False
    ) -> None:
        """Adds the call of the experts module of MoE layer number `row`.

        Args:
            row: of the layer.
            layer: the layer itself.
            top_k_index_TK: the ids that the module receives.
            top_k_weights_TK: their weights.
            is_masked: a mask is in force, which leaves the choices that it took away in the list, at weight 0.

        Raises:
            InputError: the module gets only a part of the tokens, or runs a second time in one pass; or ids are to be kept
                of masked tokens, some of which have fewer than others.
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
        ones = (top_k_weights_TK != 0).flatten().int() if is_masked else self._pass.one(keys)
        self._pass.add(self._pass.counts, row, keys, ones)
        if self._captures_weights:
            self._pass.add(self._pass.weights, row, keys, top_k_weights_TK.detach().flatten().float())
        if self._captures_ids:
            if is_masked:
                raise InputError(
                    "got routed ids to keep under an expert mask, expected none; count without `ids` there"
                )
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
        """(T * K,) indices into a layer's flat (segments + 1, E) sums."""
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
        device = self.ids[0].device
        ids_TLK = torch.stack([layer_ids.to(device) for layer_ids in self.ids], dim=1).cpu().numpy()
        ids_TLK = ids_TLK if ids_TLK.dtype == np.uint8 else ids_TLK.view(np.uint16)
        segments_T = self.segments_T.cpu().numpy()
        order = np.argsort(segments_T, kind="stable")
        starts = np.searchsorted(segments_T[order], np.arange(self.num_segments + 1))
        return [ids_TLK[order[start:end]] for start, end in itertools.pairwise(starts)]


@contextmanager
def counting(model: nn.Module, *, weights: bool = False, ids: bool = False) -> Iterator[RoutingCounter]:
    """Attaches a counter to the model's experts modules; leaves no hook behind, also after an error.

    The hooks only read, so outputs are bit-identical to those without a counter. Under a mask, which has to be entered
    first, choices that the mask took away do not count.

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
        is_masked = has_mask(layer.experts)

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            counter.observe(row, layer, *routing_of_call(layer, args, dict(kwargs))[1:], is_masked=is_masked)

        setattr(hook, COUNTS, True)
        return hook

    try:
        for row, layer in enumerate(moe_layers):
            handles.append(layer.experts.register_forward_pre_hook(make_hook(row, layer), with_kwargs=True))
        with uncompiled():
            yield counter
    finally:
        for handle in handles:
            handle.remove()
