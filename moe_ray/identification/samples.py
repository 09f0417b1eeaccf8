"""What a test of a batch compares: per example a numerator for each expert, and a denominator.

Shape suffixes: N examples, X experts of all layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moe_ray.identification.relabellings import group_of_each
from moe_ray.identification.risk import Floats


@dataclass(frozen=True, kw_only=True)
class Samples:
    """What a test compares: per example a numerator for each expert, and a denominator.

    Attributes:
        values_NX: (N, X) routed tokens, routed weight, or a prompt's own rate.
        sizes_N: (N,) tokens, or 1 where every prompt counts alike.
        is_unsafe_N: (N,) bool, both values present.
        groups_N: (N,) stratum of each example, see `group_of_each`.
    """

    values_NX: Floats
    sizes_N: Floats
    is_unsafe_N: npt.NDArray[np.bool_]
    groups_N: npt.NDArray[np.int64]

    def __repr__(self) -> str:
        num_unsafe = int(self.is_unsafe_N.sum())
        num_pairs = len(np.unique(self.groups_N[self.groups_N > 0]))
        labels = f"{len(self.is_unsafe_N) - num_unsafe} safe + {num_unsafe} unsafe"
        return f"Samples({labels}, {num_pairs} pairs, {self.values_NX.shape[1]} experts)"

    @classmethod
    def of(
        cls,
        values_NX: npt.ArrayLike,
        sizes_N: npt.ArrayLike,
        is_unsafe_N: npt.NDArray[np.bool_],
        pairs_N: npt.NDArray[np.object_] | None = None,
    ) -> Samples:
        """Samples of plain arrays; `pairs_N` holds equal text on the examples of a pair."""
        values_NX, sizes_N = np.asarray(values_NX, dtype=np.float64), np.asarray(sizes_N, dtype=np.float64)
        groups_N = group_of_each(is_unsafe_N, pairs_N)
        return cls(values_NX=values_NX, sizes_N=sizes_N, is_unsafe_N=is_unsafe_N, groups_N=groups_N)

    def difference(self) -> Floats:
        """(X,) summed values / summed sizes of the unsafe examples, less that of the safe ones."""
        unsafe_X, safe_X = self.rates()
        return np.asarray(unsafe_X - safe_X)

    def rates(self) -> tuple[Floats, Floats]:
        """(X,) summed values / summed sizes of the unsafe examples, and (X,) of the safe ones."""
        unsafe_X, safe_X = (
            self.values_NX[rows].sum(axis=0) / self.sizes_N[rows].sum()
            for rows in (self.is_unsafe_N, ~self.is_unsafe_N)
        )
        return np.asarray(unsafe_X), np.asarray(safe_X)

    def centred(self) -> Floats:
        """(N, X) values less what each example would have at the expert's overall rate; columns sum to 0."""
        rate_X = self.values_NX.sum(axis=0) / self.sizes_N.sum()
        return np.asarray(self.values_NX - self.sizes_N[:, None] * rate_X)

    def residuals(self) -> Floats:
        """(N, X) values less what each example would have at its own label's rate; they sum to 0 over either label."""
        residuals_NX = np.empty_like(self.values_NX)
        for rows in (self.is_unsafe_N, ~self.is_unsafe_N):
            rate_X = self.values_NX[rows].sum(axis=0) / self.sizes_N[rows].sum()
            residuals_NX[rows] = self.values_NX[rows] - self.sizes_N[rows, None] * rate_X
        return residuals_NX
