"""The sets of experts that a batch is asked without: its selection, and sets that differ from it in one thing only.

    selected        the batch's unsafe experts
    matched         as many others of each layer, disjoint from it, with nearly its share of tokens, otherwise at random
    busiest         as many of each layer: those that most of the unsafe tokens are routed to, whatever safe ones do
    other           another category's unsafe experts
    global          one list for all batches, as many experts: the largest mean risk differences
    forced          tokens may use nothing but the selection, in layers that have any of it
    forced_matched  the same of the first matched set
    alone           one selected expert
    spared          the selection but for one expert
    coalition       the strongest so many selected experts

Shape suffixes: L MoE layers, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from moe_ray.experts import Expert, Mask

SELECTED, MATCHED, BUSIEST, OTHER, GLOBAL = "selected", "matched", "busiest", "other", "global"
FORCED, FORCED_MATCHED = "forced", "forced_matched"
ALONE, SPARED, COALITION = "alone", "spared", "coalition"

Floats = npt.NDArray[np.float64]

_TRIES, _NEAREST_PART, _FEWEST_NEAREST, _MOST_NEAREST = 400, 5, 3, 20
"""Random sets of a layer that are looked at. One is drawn of those with the nearest share: of a fifth of the different ones,
at least 3 and at most 20, so that draws are near and yet not all the same."""


class ExpertSet(NamedTuple):
    """A set of experts and what is done with it.

    Attributes:
        name: one of the kinds above.
        draw: number of the draw; of a coalition, how many experts it has.
        expert: which one it is about, by name; empty where it is about a whole set.
        mask_LE: (L, E) the experts.
        is_forced: tokens may use these only; else they may use all but these.
    """

    name: str
    draw: int
    expert: str
    mask_LE: Mask
    is_forced: bool = False

    @property
    def allowed(self) -> Mask:
        """(L, E) bool: what the router may choose; a layer with none is left alone."""
        return self.mask_LE if self.is_forced else ~self.mask_LE


def routed_around(mask_LE: Mask, num_experts_per_tok: int) -> Mask:
    """(L, E): the experts that tokens can be routed around.

    A layer in which fewer experts would be left than a token uses is left alone: what changed there would be how many
    experts a token has, and not which.
    """
    num_left_L = mask_LE.shape[1] - mask_LE.sum(axis=1)
    around_LE: Mask = mask_LE & (num_left_L >= num_experts_per_tok)[:, None]
    return around_LE


def matched_set(mask_LE: Mask, share_LE: Floats, rng: np.random.Generator) -> Mask:
    """(L, E): in each layer as many other experts, drawn among those with the nearest sum of shares.

    None is of the selection: a control that holds some of it measures the selection against itself. Where a layer has fewer
    others than selected ones, all others are taken.

    Args:
        mask_LE: the selection.
        share_LE: of a layer's tokens that are routed to each expert.
        rng: draws.
    """
    found_LE = np.zeros_like(mask_LE)
    for layer, selected_E in enumerate(mask_LE):
        others = np.flatnonzero(~selected_E)
        size = min(int(selected_E.sum()), len(others))
        if size:
            tries = np.sort(rng.random((_TRIES, len(others))).argsort(axis=1)[:, :size], axis=1)
            drawn = others[np.unique(tries, axis=0)]
            num_near = max(_FEWEST_NEAREST, min(_MOST_NEAREST, len(drawn) // _NEAREST_PART))
            gaps = np.abs(share_LE[layer][drawn].sum(axis=1) - share_LE[layer][selected_E].sum())
            near = gaps.argsort(kind="stable")[:num_near]
            found_LE[layer, drawn[near[rng.integers(len(near))]]] = True
    return found_LE


def busiest_set(mask_LE: Mask, unsafe_LE: Floats) -> Mask:
    """(L, E): in each layer as many experts: those with the largest share of the unsafe tokens, ties by index."""
    found_LE = np.zeros_like(mask_LE)
    for layer, row_E in enumerate(unsafe_LE):
        found_LE[layer, np.argsort(-row_E, kind="stable")[: int(mask_LE[layer].sum())]] = True
    return found_LE


def as_mask(experts: Sequence[Expert], layers: Sequence[int], num_experts: int) -> Mask:
    """(L, E) of a list of experts."""
    mask_LE = np.zeros((len(layers), num_experts), dtype=bool)
    for expert in experts:
        mask_LE[layers.index(expert.layer), expert.expert] = True
    return mask_LE


def single_experts(mask_LE: Mask, ranked: Sequence[Expert], layers: Sequence[int], most: int) -> list[ExpertSet]:
    """The strongest `most` experts of a selection, each alone and each spared.

    Args:
        mask_LE: the selection, as tokens can be routed around it.
        ranked: the batch's experts, the strongest first.
        layers: decoder layer indices of the mask's rows.
        most: how many experts.
    """
    found = []
    for expert in _of_mask(mask_LE, ranked, layers)[:most]:
        alone_LE = as_mask([expert], layers, mask_LE.shape[1])
        found.append(ExpertSet(ALONE, 0, str(expert), alone_LE))
        if (mask_LE & ~alone_LE).any():
            found.append(ExpertSet(SPARED, 0, str(expert), mask_LE & ~alone_LE))
    return found


def coalitions(mask_LE: Mask, ranked: Sequence[Expert], layers: Sequence[int], num_sizes: int) -> list[ExpertSet]:
    """The strongest experts of a selection together: 1, 2, 4, 8 and so on, and never all of them.

    Args:
        mask_LE: the selection, as tokens can be routed around it.
        ranked: the batch's experts, the strongest first.
        layers: decoder layer indices of the mask's rows.
        num_sizes: how many coalitions at most.
    """
    experts = _of_mask(mask_LE, ranked, layers)
    # The same sizes in every batch, so that each can be averaged.
    sizes = [size for size in (2**power for power in range(num_sizes)) if size < len(experts)]
    return [ExpertSet(COALITION, size, "", as_mask(experts[:size], layers, mask_LE.shape[1])) for size in sizes]


def _of_mask(mask_LE: Mask, ranked: Sequence[Expert], layers: Sequence[int]) -> list[Expert]:
    return [expert for expert in ranked if mask_LE[layers.index(expert.layer), expert.expert]]
