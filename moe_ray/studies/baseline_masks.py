"""Which experts a baseline trains in which batch: pure functions of the per-batch masks and of the risk table.

Where a rule puts a batch's experts in an order, the order is kept as each expert's place in it, so that as many can be
taken as a budget asks for.

Shape suffixes: B batches, L MoE layers, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import pandas as pd

from moe_ray.errors import InputError
from moe_ray.experts import Expert, ExpertMasks, Mask, mask_to_experts, masks_from_experts
from moe_ray.identification.risk_tables import Risk, batch_tables
from moe_ray.identification.selection import draw_experts

SIEVE_SHARE = 0.25
"""Of a layer's experts that MoE-Sieve trains: what its authors recommend."""

_Places = Callable[[npt.NDArray[np.float64]], npt.NDArray[np.int32]]
"""(L, E) values to each expert's place."""

_MISSING = {
    "w_unsafe": "set capture.weights=true, which captures again, or leave esft_gate out of compare.names",
    "reap_unsafe": "capture REAP saliency (capture.scores=[reap]), or leave reap out of compare.names",
}
"""What to do where the risk table lacks a column."""


@dataclass(frozen=True, kw_only=True)
class Ranked:
    """Every batch's experts in an order, and how many of them are taken.

    Attributes:
        batch_idx: B batches.
        layers: L decoder layer indices.
        place_BLE: each expert's place in its batch's order, or in its layer's, from 0.
        size_BL1: how many are taken of the batch, or of the layer; the same in all layers of a batch for the former.
    """

    batch_idx: tuple[int, ...]
    layers: tuple[int, ...]
    place_BLE: npt.NDArray[np.int32]
    size_BL1: npt.NDArray[np.int64]

    def union_size(self, growth: float) -> int:
        """Experts that some batch takes, with `growth` times as many for each."""
        return int(self._taken(growth).any(axis=0).sum())

    def masks(self, growth: float = 1.0) -> ExpertMasks:
        """The masks with `growth` times as many experts for each batch, at least one where it has any."""
        taken_BLE = self._taken(growth)
        selected = {}
        for batch, taken_LE, place_LE in zip(self.batch_idx, taken_BLE, self.place_BLE, strict=True):
            places = place_LE[taken_LE]
            experts = mask_to_experts(taken_LE, self.layers)
            selected[batch] = tuple(experts[position] for position in np.argsort(places, kind="stable"))
        return masks_from_experts(selected, layers=self.layers, num_experts=self.place_BLE.shape[2])

    def masks_of_union(self, num_experts: int) -> ExpertMasks:
        """The masks whose union is as near as possible to so many experts: all batches take more, or fewer, alike."""
        tried = {1.0: self.union_size(1.0)}
        # The union grows with every batch's number, in steps: the first that is so large, and the last that is no larger.
        self._try_around(num_experts, tried)
        nearest = min(abs(size - num_experts) for size in tried.values())
        # Both ends of each step that is as near as any, among which is the growth that changes least.
        for size in {size for size in tried.values() if abs(size - num_experts) == nearest}:
            self._try_around(size, tried)
        # Of equally near ones, that which is nearest to as many experts as the batches have.
        growth = min(tried, key=lambda growth: (abs(tried[growth] - num_experts), abs(growth - 1)))
        return self.masks(growth)

    def _try_around(self, size: int, tried: dict[float, int]) -> None:
        """Adds growths from both sides of where the union becomes so large, and of where it becomes larger."""
        for reached in (size, size + 1):
            low, high = 0.0, float(self.place_BLE[0].size)
            for _ in range(40):
                middle = (low + high) / 2
                tried[middle] = self.union_size(middle)
                low, high = (middle, high) if tried[middle] < reached else (low, middle)

    def _taken(self, growth: float) -> npt.NDArray[np.bool_]:
        limit_BL1 = np.where(self.size_BL1 > 0, np.maximum(1, np.rint(growth * self.size_BL1)), 0)
        taken_BLE: npt.NDArray[np.bool_] = self.place_BLE < limit_BL1
        return taken_BLE


def average_size(masks: ExpertMasks) -> int:
    """Experts of the average trained batch, rounded."""
    return round(float(np.mean([len(masks.selected[batch]) for batch in masks.trained_batches])))


def only_batches(ours: ExpertMasks, batches: Collection[int]) -> ExpertMasks:
    """The same masks, with no expert for any other batch, so that it does not train."""
    return _like(ours, {batch: ours.selected[batch] for batch in ours.batch_idx if batch in batches})


def global_masks(ours: ExpertMasks, risk: Risk, *, num_experts: int, column: str = "risk_diff") -> ExpertMasks:
    """The same experts for every batch: those with the largest value of the column, averaged over batches.

    Args:
        ours: the per-batch masks.
        risk: from `identify`.
        num_experts: of the list.
        column: that the per-batch masks were chosen by.
    """
    sums_LE, num_batches = np.zeros(ours.masks_BLE.shape[1:]), 0
    for _, table in batch_tables(risk, [column]):
        sums_LE += _by_expert(table, column, ours)
        num_batches += 1
    taken_LE = _places(sums_LE / num_batches, by_layer=False) < num_experts
    return _same_for_all(ours, mask_to_experts(taken_LE, ours.layers))


def random_masks(ours: ExpertMasks, *, seed: int) -> ExpertMasks:
    """For every batch as many experts of each layer as it has, drawn without regard to any number."""
    every = np.arange(ours.masks_BLE.shape[2])
    selected = {}
    for batch in ours.trained_batches:
        rng = np.random.default_rng([seed, batch])
        sizes_L = ours[batch].sum(axis=1)
        selected[batch] = tuple(
            expert
            for layer, size in zip(ours.layers, sizes_L.tolist(), strict=True)
            for expert in draw_experts(rng, layer, every, number=size)
        )
    return _like(ours, selected)


def renamed_masks(ours: ExpertMasks, *, seed: int) -> ExpertMasks:
    """The same masks with each layer's experts exchanged at random, all batches alike.

    As many experts of each layer, batch and union, and the same overlap between batches.
    """
    rng = np.random.default_rng(seed)
    num_experts = ours.masks_BLE.shape[2]
    name_of = {layer: rng.permutation(num_experts).tolist() for layer in ours.layers}
    return _like(
        ours,
        {
            batch: tuple(Expert(layer, name_of[layer][expert]) for layer, expert in ours.selected[batch])
            for batch in ours.trained_batches
        },
    )


def shuffled_masks(ours: ExpertMasks, category_of: Mapping[int, str], *, seed: int) -> ExpertMasks:
    """Masks of other categories: every batch gets that of a batch of one other category, its own batches' in turn.

    Batches of one category have much alike in their masks, so that exchanging those would take away little. Where all
    batches are of one category, each counts as one of its own.

    Args:
        ours: the per-batch masks.
        category_of: per `batch_idx`.
        seed: of which category gets which.

    Raises:
        InputError: fewer than two batches have experts.
    """
    batches = list(ours.trained_batches)
    if len(batches) < 2:
        raise InputError(
            f"baseline shuffled: got {len(batches)} batches with unsafe experts, expected 2 or more; leave it out of "
            "compare.names"
        )
    names = [category_of.get(batch, "") for batch in batches]
    if len(set(names)) == 1:
        names = [str(batch) for batch in batches]
    order = np.random.default_rng(seed).permutation(sorted(set(names))).tolist()
    giver_of = dict(zip(order, [*order[1:], order[0]], strict=True))  # one cycle: none is its own
    own = {name: [batch for batch, of in zip(batches, names, strict=True) if of == name] for name in order}
    selected = {}
    for name, of_category in own.items():
        givers = own[giver_of[name]]
        for position, batch in enumerate(of_category):
            selected[batch] = ours.selected[givers[position % len(givers)]]
    return _like(ours, selected)


def largest_of_layers(ours: ExpertMasks, risk: Risk, *, column: str) -> Ranked:
    """For every batch as many experts of each layer as it has: those with the largest values of `column`.

    Raises:
        InputError: the risk table has no such column.
    """
    sizes = {batch: ours[batch].sum(axis=1) for batch in ours.trained_batches}
    return _ranked(ours, risk, column, partial(_places, by_layer=True), sizes)


def largest_shares(ours: ExpertMasks, risk: Risk, *, column: str) -> Ranked:
    """For every batch as many experts as it has: those with the largest share of their layer's total of `column`.

    Source: ESFT (Wang et al. 2024, "Let the Expert Stick to His Last"), token selection ratio (`a_unsafe`) and average
    gate score (`w_unsafe`). Deviation: the paper takes experts until their shares reach a given sum in every layer; here
    the number is that of the masks it is compared with, per batch and over all layers.

    Raises:
        InputError: the risk table has no such column.
    """

    def places(values_LE: npt.NDArray[np.float64]) -> npt.NDArray[np.int32]:
        totals_L1 = values_LE.sum(axis=1, keepdims=True)
        return _places(values_LE / np.where(totals_L1 > 0, totals_L1, 1.0), by_layer=False)

    sizes = {batch: np.full(len(ours.layers), len(ours.selected[batch])) for batch in ours.trained_batches}
    return _ranked(ours, risk, column, places, sizes)


def sieve_masks(ours: ExpertMasks, risk: Risk) -> ExpertMasks:
    """The same experts for every batch: of each layer the quarter that most tokens of all batches are routed to.

    Source: MoE-Sieve (Manzoni 2026, arXiv 2603.24044).
    """
    num_layers, num_experts = ours.masks_BLE.shape[1:]
    tokens_LE = np.zeros((num_layers, num_experts))
    trained = set(ours.trained_batches)
    for batch, table in batch_tables(risk, ["a_safe", "a_unsafe"]):
        if batch in trained:
            safe_LE, unsafe_LE = (_by_expert(table, name, ours) for name in ("a_safe", "a_unsafe"))
            tokens_LE += safe_LE + unsafe_LE
    taken_LE = _places(tokens_LE, by_layer=True) < max(1, round(SIEVE_SHARE * num_experts))
    return _same_for_all(ours, mask_to_experts(taken_LE, ours.layers))


def all_experts_masks(ours: ExpertMasks) -> ExpertMasks:
    """Every expert for every batch."""
    everything = np.ones(ours.masks_BLE.shape[1:], dtype=bool)
    return _same_for_all(ours, mask_to_experts(everything, ours.layers))


def masks_around(ours: ExpertMasks, batches: Iterable[int]) -> ExpertMasks:
    """Per batch all experts but its unsafe ones; a layer all of whose experts are unsafe has none, and so routes naturally.

    Args:
        ours: the per-batch masks.
        batches: `batch_idx`s to give a mask; one without unsafe experts gets all.
    """
    known = dict(zip(ours.batch_idx, ours.masks_BLE, strict=True))
    nothing: Mask = np.zeros(ours.masks_BLE.shape[1:], dtype=bool)
    around = {batch: mask_to_experts(~known.get(batch, nothing), ours.layers) for batch in batches}
    return masks_from_experts(around, layers=ours.layers, num_experts=ours.masks_BLE.shape[2])


def _ranked(
    ours: ExpertMasks, risk: Risk, column: str, places: _Places, sizes: Mapping[int, npt.NDArray[np.int64]]
) -> Ranked:
    if column not in risk:
        raise InputError(f"a baseline needs the column {column!r}, which the risk table lacks; {_MISSING[column]}")
    place_BLE = np.zeros(ours.masks_BLE.shape, dtype=np.int32)
    size_BL1 = np.zeros((*ours.masks_BLE.shape[:2], 1), dtype=np.int64)
    position_of = {batch: position for position, batch in enumerate(ours.batch_idx)}
    for batch, table in batch_tables(risk, [column]):
        if batch in sizes:
            place_BLE[position_of[batch]] = places(_by_expert(table, column, ours))
            size_BL1[position_of[batch], :, 0] = sizes[batch]
    return Ranked(batch_idx=ours.batch_idx, layers=ours.layers, place_BLE=place_BLE, size_BL1=size_BL1)


def _by_expert(table: pd.DataFrame, column: str, ours: ExpertMasks) -> npt.NDArray[np.float64]:
    """(L, E) values of a batch's rows; what was not measured of an expert speaks neither for it nor against it."""
    ordered = table.sort_values(["layer", "expert"])[column].fillna(0.0)
    return ordered.to_numpy(dtype=np.float64).reshape(ours.masks_BLE.shape[1:])


def _places(values_LE: npt.NDArray[np.float64], *, by_layer: bool) -> npt.NDArray[np.int32]:
    """(L, E) place of each value, the largest first, among its layer's or among all; ties by (layer, expert)."""
    rows = values_LE if by_layer else values_LE.reshape(1, -1)
    order = np.argsort(-rows, axis=1, kind="stable")
    return np.argsort(order, axis=1, kind="stable").astype(np.int32).reshape(values_LE.shape)


def _same_for_all(ours: ExpertMasks, experts: tuple[Expert, ...]) -> ExpertMasks:
    return _like(ours, {batch: experts for batch in ours.trained_batches})


def _like(ours: ExpertMasks, selected: Mapping[int, Iterable[Expert]]) -> ExpertMasks:
    """Masks of the same batches; those that our masks leave untrained stay so, which keeps the steps equal."""
    complete: Mapping[int, Sequence[Expert]] = {batch: tuple(selected.get(batch, ())) for batch in ours.batch_idx}
    return masks_from_experts(complete, layers=ours.layers, num_experts=ours.masks_BLE.shape[2])
