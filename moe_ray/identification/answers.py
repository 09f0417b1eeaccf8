"""One batch's answers, a row for each: what was captured of them beside the routing of prompts.

Shape suffixes: M examples with an answer, X experts of all layers (by layer, then expert).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_ray.routing.counts import RoutingCounts

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Answers:
    """A batch's examples that have an answer; their scores are those of the answer as a whole, whatever roles count.

    Attributes:
        is_unsafe_M: (M,) bool.
        tokens_M: (M,) counted tokens of the answer.
        counts_MX: (M, X) of them routed to each expert.
        pairs_M: (M,) what the examples of a pair share; None where pairs are not known.
        attribution_MX: (M, X) weight attribution; None = not captured, as of all that follows.
        gate_MX: (M, X) gate attribution.
        refusal_MX: (M, X) tokens of the example's refusal routed to each expert.
        refusal_tokens_M: (M,) counted tokens of the refusal; 0 = the example has none.
        gate_refusal_MX: (M, X) gate attribution of the refusal.
    """

    is_unsafe_M: npt.NDArray[np.bool_]
    tokens_M: npt.NDArray[np.int64]
    counts_MX: Floats
    pairs_M: npt.NDArray[np.object_] | None = None
    attribution_MX: Floats | None = None
    gate_MX: Floats | None = None
    refusal_MX: Floats | None = None
    refusal_tokens_M: npt.NDArray[np.int64] | None = None
    gate_refusal_MX: Floats | None = None

    @property
    def has_both_labels(self) -> bool:
        """Whether there is an answer to a safe and one to an unsafe example."""
        return bool(self.is_unsafe_M.any() and not self.is_unsafe_M.all())

    @property
    def is_refused_too(self) -> npt.NDArray[np.bool_]:
        """(M,) the examples whose refusal was captured beside their answer."""
        if self.refusal_tokens_M is None:
            return np.zeros(len(self.tokens_M), dtype=bool)
        return np.asarray(self.refusal_tokens_M > 0)


def answers_of(counts: RoutingCounts, rows: npt.NDArray[np.int64], is_unsafe_M: npt.NDArray[np.bool_]) -> Answers:
    """The given rows, which are of role `response` and of one batch."""

    def chosen(values: npt.NDArray[Any] | None) -> Any:
        return None if values is None else values[rows].reshape(len(rows), -1).astype(np.float64)

    return Answers(
        is_unsafe_M=is_unsafe_M,
        tokens_M=counts.num_tokens[rows],
        counts_MX=chosen(counts.counts_NLE),
        pairs_M=None if counts.pair is None else counts.pair[rows],
        attribution_MX=chosen(counts.attribution_NLE),
        gate_MX=chosen(counts.gate_NLE),
        refusal_MX=chosen(counts.refusal_NLE),
        refusal_tokens_M=None if counts.refusal_tokens is None else counts.refusal_tokens[rows],
        gate_refusal_MX=chosen(counts.gate_refusal_NLE),
    )
