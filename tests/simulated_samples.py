"""Samples of simulated batches, for the tests of the permutation test and of what else says how sure a difference is."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from moe_ray.experts import Expert
from moe_ray.identification.risk import ExampleCounts, example_counts
from moe_ray.identification.samples import Samples
from moe_ray.testing.simulated_counts import Population, simulate

ROUNDING = 1e-12


def samples_of(batch: ExampleCounts, pairs: npt.NDArray[np.object_] | None = None) -> Samples:
    return Samples.of(batch.counts_NX, batch.tokens_N, batch.is_unsafe_N, pairs)


def a_batch(*, seed: int = 0, each: int = 8, planted: tuple[Expert, ...] = (), shift: float = 0.0) -> Samples:
    counts = simulate(Population(), safe_per_batch=each, unsafe_per_batch=each, planted=planted, shift=shift, seed=seed)
    return samples_of(next(example_counts(counts)))
