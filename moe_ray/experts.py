"""Experts and the masks made of them.

Masks are looked up by `batch_idx`, never by position, so that a batch that is dropped leaves every other one its own mask.

Shape suffixes: B batches, L MoE layers, E experts, M experts of all batches.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from moe_ray.errors import InputError

if TYPE_CHECKING:
    import pandas as pd


class Expert(NamedTuple):
    """One expert: decoder layer index in the model, and index in that layer. Sorts by (layer, expert)."""

    layer: int
    expert: int

    def __str__(self) -> str:
        return f"L{self.layer:02d}_E{self.expert:02d}"

    @classmethod
    def parse(cls, name: str) -> Expert:
        """The expert of such a name.

        Raises:
            ValueError: it is no such name.
        """
        found = re.fullmatch(r"L(\d{2,5})_E(\d{2,5})", name)
        if found is None:
            raise ValueError(f"got {name!r}, expected a name such as 'L00_E17': layer 0, expert 17")
        return cls(int(found[1]), int(found[2]))


class Router(NamedTuple):
    """The router of one MoE layer: decoder layer index in the model."""

    layer: int

    def __str__(self) -> str:
        return f"L{self.layer:02d}_router"


Mask = npt.NDArray[np.bool_]

ShortLayers = Literal["allowed_only", "natural"]
"""Policy of a layer with fewer unsafe experts than a token uses."""

EXPERTS_ARE_COPIES = (
    "All experts of a layer are equal, as in a model that was just made by copying one dense layer: which of them are "
    "routed, selected or masked makes no difference to its answers, so nothing about the selection can show before "
    "training. Routing still differs between prompts, and is counted; moe-ray upcycle --method split makes experts that "
    "differ"
)
"""Said where a model is met of which `models.expert_copies.experts_are_copies` is true."""


@dataclass(frozen=True, kw_only=True)
class ExpertMasks:
    """One mask per batch; True = unsafe expert of that batch = may be routed while that batch trains.

    Attributes:
        batch_idx: B batches' stable ids, in the masks' order.
        masks_BLE: (B, L, E) bool.
        layers: L decoder layer indices.
        selected: per `batch_idx`, its unsafe experts, the largest risk difference first.
    """

    batch_idx: tuple[int, ...]
    masks_BLE: npt.NDArray[np.bool_]
    layers: tuple[int, ...]
    selected: Mapping[int, tuple[Expert, ...]]

    def __getitem__(self, batch_idx: int) -> Mask:
        """(L, E) mask of a batch.

        Raises:
            InputError: there is no mask of that batch.
        """
        if batch_idx not in self._position_of:
            raise InputError(f"no mask of batch {batch_idx}; got masks of batches {list(self.batch_idx)[:20]}")
        mask: Mask = self.masks_BLE[self._position_of[batch_idx]]
        return mask

    def __repr__(self) -> str:
        num_batches, num_layers, num_experts = self.masks_BLE.shape
        return f"ExpertMasks({num_batches} batches, {num_layers}x{num_experts}, union {int(self.union.sum())})"

    @cached_property
    def _position_of(self) -> dict[int, int]:
        # Every step of a training asks for a mask, so that a search along thousands of batches would be felt.
        return {batch_idx: position for position, batch_idx in enumerate(self.batch_idx)}

    def to_frame(self) -> pd.DataFrame:
        """One row per batch and unsafe expert, the strongest of a batch first: `batch_idx, layer, expert, name`."""
        # Imported here: what only reads or applies masks, such as `merge`, starts without pandas.
        import pandas as pd

        rows = [(batch, *expert, str(expert)) for batch in self.batch_idx for expert in self.selected[batch]]
        return pd.DataFrame(rows, columns=["batch_idx", "layer", "expert", "name"])

    @property
    def union(self) -> Mask:
        """(L, E): experts that are unsafe in at least one batch; the only ones that may ever change."""
        return np.asarray(self.masks_BLE.any(axis=0))

    @property
    def union_experts(self) -> tuple[Expert, ...]:
        """The union as experts, by (layer, expert)."""
        return mask_to_experts(self.union, self.layers)

    @property
    def trained_batches(self) -> tuple[int, ...]:
        """Batches with at least one unsafe expert."""
        return tuple(batch for batch in self.batch_idx if self.selected[batch])

    def empty_layers(self, batch_idx: int) -> tuple[int, ...]:
        """Decoder layers with no unsafe expert in the batch."""
        return tuple(layer for layer, row in zip(self.layers, self[batch_idx], strict=True) if not row.any())

    def short_layers(self, batch_idx: int, num_experts_per_tok: int) -> tuple[int, ...]:
        """Decoder layers with some, but fewer unsafe experts than a token uses."""
        sizes = self[batch_idx].sum(axis=1)
        return tuple(layer for layer, size in zip(self.layers, sizes, strict=True) if 0 < size < num_experts_per_tok)

    def digest(self) -> str:
        """A hash of batches and masks."""
        packed = np.packbits(self.masks_BLE).tobytes()
        head = repr((self.batch_idx, self.layers, self.masks_BLE.shape)).encode()
        return hashlib.sha256(head + packed).hexdigest()[:16]


def router_mask(mask_LE: Mask, *, num_experts_per_tok: int, short_layers: ShortLayers) -> Mask:
    """(L, E): the router mask of a batch; an all-False row leaves that layer unrestricted.

    Args:
        mask_LE: (L, E) the batch's unsafe experts.
        num_experts_per_tok: the router's k.
        short_layers: allowed_only = tokens use only a short layer's few unsafe experts; natural = it is unrestricted.
    """
    if short_layers == "allowed_only":
        return mask_LE
    is_long_L1 = mask_LE.sum(axis=1, keepdims=True) >= num_experts_per_tok
    restricted_LE: Mask = np.logical_and(mask_LE, is_long_L1)
    return restricted_LE


def masks_from_experts(
    selected: Mapping[int, Iterable[Expert]], *, layers: Sequence[int], num_experts: int
) -> ExpertMasks:
    """Masks from lists of experts per `batch_idx`.

    Raises:
        InputError: an expert is outside the model.
    """
    lists = {batch_idx: tuple(experts) for batch_idx, experts in selected.items()}
    sizes = np.fromiter(map(len, lists.values()), dtype=np.int64, count=len(lists))
    flat = chain.from_iterable(chain.from_iterable(lists.values()))
    pairs_M2 = np.fromiter(flat, dtype=np.int64, count=2 * int(sizes.sum())).reshape(-1, 2)
    row_of = np.full(max([*layers, *pairs_M2[:, 0].tolist()], default=0) + 1, -1)
    row_of[list(layers)] = np.arange(len(layers))
    batch_M, row_M, expert_M = np.repeat(np.arange(len(lists)), sizes), row_of[pairs_M2[:, 0]], pairs_M2[:, 1]
    outside = np.flatnonzero((pairs_M2[:, 0] < 0) | (row_M < 0) | (expert_M < 0) | (expert_M >= num_experts))
    if len(outside):
        batch_idx, expert = tuple(lists)[batch_M[outside[0]]], Expert(*pairs_M2[outside[0]].tolist())
        raise InputError(f"batch {batch_idx}: expert {expert} is outside layers {list(layers)} x {num_experts} experts")
    masks_BLE = np.zeros((len(lists), len(layers), num_experts), dtype=bool)
    masks_BLE[batch_M, row_M, expert_M] = True
    return ExpertMasks(batch_idx=tuple(lists), masks_BLE=masks_BLE, layers=tuple(layers), selected=lists)


def mask_to_experts(mask_LE: Mask, layers: Sequence[int]) -> tuple[Expert, ...]:
    """The True entries of a mask as experts, by (layer, expert)."""
    return tuple(Expert(layers[row], int(expert)) for row, expert in np.argwhere(mask_LE))
