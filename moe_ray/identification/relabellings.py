"""Relabellings: the ways in which the labels of a batch's examples could have fallen, were routing blind to them.

Examples of a pair trade labels with each other only; all other examples trade freely. With 8 safe and 8 unsafe single
prompts there are 12,870 relabellings, with 8 pairs 256, and all are used; where there are more than a limit, that many
are drawn, the observed labels always among them. Every batch of the same make-up shares one cached set.

Shape suffixes: P relabellings, N examples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations

import numpy as np
import numpy.typing as npt

Strata = tuple[tuple[int, int], ...]
"""Per group of exchangeable examples: how many there are, and how many of them are unsafe."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Relabellings:
    """Sets of examples called unsafe.

    Attributes:
        unsafe_NP: (N, P) float32, 1 = unsafe; column 0 is what was observed. Rows are ordered by stratum, and within a
            stratum the examples observed as unsafe come first.
        is_mirrored: each column stands for its opposite as well, in which safe and unsafe are exchanged.
        is_exact: every possible relabelling is there, once.
        is_one_stratum: all examples trade with all.

    The set is closed under complement where it is mirrored, so the observed labelling is exchangeable with every member.
    """

    unsafe_NP: npt.NDArray[np.float32]
    is_mirrored: bool
    is_exact: bool
    is_one_stratum: bool

    def __repr__(self) -> str:
        how = "all" if self.is_exact else "drawn"
        return f"Relabellings({self.num} of {self.unsafe_NP.shape[0]} examples, {how})"

    @property
    def num(self) -> int:
        """Relabellings, with the opposites and the observed labels."""
        num_columns: int = self.unsafe_NP.shape[1]
        return num_columns * (2 if self.is_mirrored else 1)


def group_of_each(is_unsafe_N: npt.NDArray[np.bool_], pairs_N: npt.NDArray[np.object_] | None) -> npt.NDArray[np.int64]:
    """(N,) the stratum of each example: 0 for those that trade freely, 1, 2, … for the pairs.

    A pair that lacks a label in these examples (its other side may be in quarantine) cannot trade inside itself, so its
    examples count as single ones.
    """
    groups_N = np.zeros(len(is_unsafe_N), dtype=np.int64)
    if pairs_N is None:
        return groups_N
    labels: dict[str, set[bool]] = {}
    for pair, is_unsafe in zip(pairs_N, is_unsafe_N, strict=True):
        if _is_named(pair):
            labels.setdefault(pair, set()).add(bool(is_unsafe))
    numbers = {pair: 1 + i for i, pair in enumerate(pair for pair, seen in labels.items() if len(seen) == 2)}
    return np.array([numbers.get(pair, 0) if _is_named(pair) else 0 for pair in pairs_N], dtype=np.int64)


def _is_named(pair: object) -> bool:
    return isinstance(pair, str) and bool(pair)


def canonical_order(
    is_unsafe_N: npt.NDArray[np.bool_], groups_N: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], Strata]:
    """The order in which `Relabellings` lists examples, and their strata."""
    order = np.lexsort((~is_unsafe_N, groups_N))
    strata = tuple(
        (int((groups_N == group).sum()), int((is_unsafe_N & (groups_N == group)).sum()))
        for group in np.unique(groups_N)
    )
    return order, strata


@lru_cache(maxsize=8)
def relabellings(strata: Strata, limit: int, seed: int) -> Relabellings:
    """All relabellings that keep each stratum's number of unsafe examples, or `limit` of them drawn by `seed`.

    Drawn ones are drawn with replacement. A mirrored set is closed under complement, so the observed labelling is
    exchangeable with every member, which is what p = (b + 1) / (m + 1) needs.
    """
    total = math.prod(math.comb(size, unsafe) for size, unsafe in strata)
    is_mirrored = all(size == 2 * unsafe for size, unsafe in strata)
    if total <= limit:
        unsafe_PN = _all(strata)
        # Combinations come in lexicographic order: the first half has the first example unsafe, the rest are opposites.
        # Half the columns are half the time and memory of the products.
        unsafe_PN = unsafe_PN[: len(unsafe_PN) // 2] if is_mirrored else unsafe_PN
    else:
        unsafe_PN = _draw(strata, max(1, limit // 2 if is_mirrored else limit), np.random.default_rng(seed))
    unsafe_NP = np.ascontiguousarray(unsafe_PN.T, dtype=np.float32)
    # Every batch of the same make-up gets this one array from the cache; a change would reach all of them.
    unsafe_NP.flags.writeable = False
    return Relabellings(
        unsafe_NP=unsafe_NP, is_mirrored=is_mirrored, is_exact=total <= limit, is_one_stratum=len(strata) == 1
    )


def _all(strata: Strata) -> npt.NDArray[np.bool_]:
    rows_PN = np.zeros((1, 0), dtype=bool)
    for size, unsafe in strata:
        chosen = np.array(list(combinations(range(size), unsafe)), dtype=np.int64).reshape(-1, unsafe)
        choices = np.zeros((len(chosen), size), dtype=bool)
        np.put_along_axis(choices, chosen, True, axis=1)
        rows_PN = np.hstack([np.repeat(rows_PN, len(choices), axis=0), np.tile(choices, (len(rows_PN), 1))])
    return rows_PN


def _draw(strata: Strata, num: int, rng: np.random.Generator) -> npt.NDArray[np.bool_]:
    parts = []
    for size, unsafe in strata:
        ranks = rng.random((num, size)).argsort(axis=1).argsort(axis=1)
        # The first is the observed labelling, in which a stratum's unsafe examples come first. Were it left to the draw, p
        # could be 0.
        ranks[0] = np.arange(size)
        parts.append(ranks < unsafe)
    return np.hstack(parts)
