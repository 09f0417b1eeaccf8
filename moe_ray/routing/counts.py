"""Routing counts: how many tokens of each example were routed to each expert.

Shape suffixes: N examples, L MoE layers, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from moe_ray.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

ROLES = ("prompt", "response", "thought")


@dataclass(frozen=True, kw_only=True)
class RoutingCounts:
    """Routed tokens per example and role.

    Attributes:
        batch_idx: (N,) batch of the example.
        in_batch_idx: (N,) its position there.
        label: (N,) `safe` or `unsafe`.
        category: (N,) text, may be empty.
        role: (N,) `prompt`, `response` or `thought`, which is what the model wrote for itself before its answer.
        num_tokens: (N,) tokens of that role that were counted.
        counts_NLE: (N, L, E) int32 tokens routed to each expert; a token counts once for each of its K experts.
        layers: L decoder layer indices.
        num_experts_per_tok: K.
        pair: (N,) text that the two examples of a pair share, empty for single examples; None = not known.
        weights_NLE: (N, L, E) float32 sums of the weights that tokens were routed with; None = not captured.
        ids: (N,) arrays of shape (num_tokens, L, K): the experts of each counted token in order, uint8 (uint16 above 256
            experts); None = not captured.
        attribution_NLE: (N, L, E) float32 weight attribution of the example's answer, see `weight_attribution`, in its row
            of role `response`; 0 in others. None = not captured, as of all that follows.
        gate_NLE: the same of gate attribution.
        reap_NLE: (N, L, E) float32 sums of router-weighted saliency over the tokens of the row.
        refusal_NLE: (N, L, E) int32 tokens of an unsafe example's refusal routed to each expert, in its row of role
            `response`; 0 elsewhere.
        refusal_tokens: (N,) how many tokens of it were counted.
        gate_refusal_NLE: gate attribution of the refusal, in the same rows.
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
    attribution_NLE: npt.NDArray[np.float32] | None = None
    gate_NLE: npt.NDArray[np.float32] | None = None
    reap_NLE: npt.NDArray[np.float32] | None = None
    refusal_NLE: npt.NDArray[np.int32] | None = None
    refusal_tokens: npt.NDArray[np.int64] | None = None
    gate_refusal_NLE: npt.NDArray[np.float32] | None = None

    def __len__(self) -> int:
        return len(self.batch_idx)

    def __repr__(self) -> str:
        examples = {*zip(self.batch_idx.tolist(), self.in_batch_idx.tolist(), strict=True)}
        num_layers, num_experts = self.counts_NLE.shape[1:]
        extras = [name.removesuffix("_NLE") for name in _EXTRAS if getattr(self, name) is not None]
        parts = [
            f"{len(examples)} examples in {len(set(self.batch_idx.tolist()))} batches",
            f"{int(self.num_tokens.sum())} tokens of {'+'.join(sorted(set(self.role)))}",
            f"{num_layers}x{num_experts}, {self.num_experts_per_tok} per token",
            *extras,
        ]
        return f"RoutingCounts({', '.join(parts)})"

    def to_frame(self) -> pd.DataFrame:
        """One row per example and role: `batch_idx, in_batch_idx, label, category, role, num_tokens`, `pair` if known.

        The counts themselves are a tensor, `counts_NLE`, whose rows are this table's.
        """
        # Imported here: what only adds counts up starts without pandas.
        import pandas as pd

        return pd.DataFrame({name: values for name, values in self.per_row().items() if name not in _TENSORS})

    def take(self, rows: npt.NDArray[Any]) -> RoutingCounts:
        """The given rows: an index array or a boolean mask, shape (N,)."""
        chosen = {name: values[rows] for name, values in self.per_row().items()}
        return RoutingCounts(**chosen, layers=self.layers, num_experts_per_tok=self.num_experts_per_tok)

    def per_row(self) -> dict[str, npt.NDArray[Any]]:
        """The arrays with one entry per row that are there, by name."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _NOT_PER_ROW}
        return {name: array for name, array in values.items() if array is not None}

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        there = [values for name in _TENSORS if (values := getattr(self, name)) is not None]
        return sum(part.nbytes for values in there for part in (values if values.dtype == object else [values]))

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
SCORE_TENSORS = ("attribution_NLE", "gate_NLE", "reap_NLE", "refusal_NLE", "gate_refusal_NLE")
"""Scores of experts beside the counts, each (N, L, E)."""

_EXTRAS = ("weights_NLE", "ids", *SCORE_TENSORS)
_TENSORS = ("counts_NLE", *_EXTRAS)


def concat_counts(parts: Sequence[RoutingCounts]) -> RoutingCounts:
    """All rows of all parts, ordered by batch, position and role.

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
