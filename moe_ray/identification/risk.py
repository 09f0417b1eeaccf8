"""Risk differences: how much more often an expert is routed on unsafe tokens than on safe ones, batch by batch.

Everything here is sums over examples, so one pass over the stored counts gives every batch's table, and the differences
are single divisions of whole numbers: equal rates give equal floats, whatever the tokens, so that ties are real ties.

Shape suffixes: N examples, X experts of all layers (layers x experts, by layer then expert), L MoE layers, E experts.

Source: the activation rates and their difference of SteerMoE (Fayyaz et al. 2025, "Steering MoE LLMs via Expert
(De)Activation", risk difference), computed per batch instead of once over all prompts.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from moe_ray.errors import InputError
from moe_ray.identification.answers import Answers, answers_of
from moe_ray.routing.counts import RoutingCounts

logger = logging.getLogger(__name__)

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class ExampleCounts:
    """One batch's counts with one row per example: the unit of every statistic.

    Attributes:
        batch_idx: the batch.
        is_unsafe_N: (N,) bool.
        tokens_N: (N,) tokens of the chosen roles.
        counts_NX: (N, L*E) tokens routed to each expert.
        weights_NX: (N, L*E) routed weight given to each expert; None where it was not captured.
        shared_NX: (N, L*E) the routed tokens of each layer shared out among its experts by routed weight, see
            `shared_by_weight`; None where that was not captured.
        pairs_N: (N,) what the examples of a pair share, empty for single examples; None where pairs are not known.
        reap_NX: (N, L*E) summed router-weighted saliency; None where it was not captured.
        answers: the examples with an answer, whatever roles were chosen; None where there are none.
    """

    batch_idx: int
    is_unsafe_N: npt.NDArray[np.bool_]
    tokens_N: npt.NDArray[np.int64]
    counts_NX: npt.NDArray[np.int64]
    weights_NX: Floats | None = None
    shared_NX: Floats | None = None
    pairs_N: npt.NDArray[np.object_] | None = None
    reap_NX: Floats | None = None
    answers: Answers | None = None

    def __repr__(self) -> str:
        num_unsafe, num_experts = int(self.is_unsafe_N.sum()), self.counts_NX.shape[1]
        labels = f"{len(self.is_unsafe_N) - num_unsafe} safe + {num_unsafe} unsafe"
        return f"ExampleCounts(batch {self.batch_idx}, {labels}, {num_experts} experts)"


def example_counts(counts: RoutingCounts, *, roles: Sequence[str] = ("prompt",)) -> Iterator[ExampleCounts]:
    """Yields every batch's counts, ascending by `batch_idx`, the rows of an example's roles added up.

    Args:
        counts: routing counts, in any row order; their `pair` (N,) and `weights_NLE` (N, L, E) are used where present.
        roles: which tokens count: `prompt`, `response` or both.

    Raises:
        InputError: there is no row in these roles, a label is unknown, or a batch has no token of one label.
    """
    rows = np.flatnonzero(np.isin(counts.role.astype(str), list(roles)) & (counts.num_tokens > 0))
    if not len(rows):
        raise InputError(
            f"no routing counts of role {' or '.join(roles)}; got {sorted(set(counts.role))}; set capture.generate=true, "
            "give examples a response, or change identify.roles"
        )
    answers = dict(_by_batch(counts, np.flatnonzero((counts.role == "response") & (counts.num_tokens > 0))))
    for batch_idx, batch_rows in _by_batch(counts, rows):
        yield _examples_of(counts, batch_rows, answers.get(batch_idx))


def _by_batch(counts: RoutingCounts, rows: npt.NDArray[np.int64]) -> Iterator[tuple[int, npt.NDArray[np.int64]]]:
    """Yields each batch that has some of the rows, ascending, and its rows by `in_batch_idx`."""
    rows = rows[np.lexsort((counts.in_batch_idx[rows], counts.batch_idx[rows]))]
    names = counts.batch_idx[rows]
    starts = np.flatnonzero(np.diff(names, prepend=names[:1] - 1))
    for batch_rows in np.split(rows, starts[1:]) if len(rows) else []:
        yield int(counts.batch_idx[batch_rows[0]]), batch_rows


def label_tokens(counts: RoutingCounts, roles: Sequence[str]) -> pd.DataFrame:
    """Tokens in these roles, by label: a row `batch_idx, safe, unsafe` per batch that has any.

    Raises:
        InputError: a label is unknown.
    """
    rows = np.flatnonzero(np.isin(counts.role.astype(str), list(roles)) & (counts.num_tokens > 0))
    is_unsafe, num_tokens = _is_unsafe(counts.label[rows]), counts.num_tokens[rows]
    tokens = pd.DataFrame(
        {"batch_idx": counts.batch_idx[rows], "safe": num_tokens * ~is_unsafe, "unsafe": num_tokens * is_unsafe}
    )
    return tokens.groupby("batch_idx", as_index=False).sum()


def batches_with_both_labels(tokens: pd.DataFrame, roles: Sequence[str]) -> list[int]:
    """The batches that can be identified, ascending; those with tokens of one label only are named in a warning.

    Args:
        tokens: `batch_idx, safe, unsafe`: tokens of each label in these roles, in any number of rows per batch.
        roles: what the tokens are of, for the messages.

    Raises:
        InputError: no batch has tokens of both labels.
    """
    sums = tokens.groupby("batch_idx")[["safe", "unsafe"]].sum()
    has_both = (sums > 0).all(axis=1)
    whole, one_sided, of_roles = sums.index[has_both].tolist(), sums.index[~has_both].tolist(), " or ".join(roles)
    if not whole:
        raise InputError(
            f"none of {len(one_sided)} batches has {of_roles} tokens of both labels; set capture.generate=true, give "
            "examples a response, or change identify.roles"
        )
    if one_sided:
        logger.warning(
            "batches %s have %s tokens of one label only, so they get no mask and are not trained",
            one_sided[:20],
            of_roles,
        )
    return whole


def _examples_of(
    counts: RoutingCounts, rows: npt.NDArray[np.int64], answers: npt.NDArray[np.int64] | None
) -> ExampleCounts:
    """The given rows, sorted by `in_batch_idx`, as one batch; `answers` are its rows of role `response`."""
    positions = counts.in_batch_idx[rows]
    firsts = np.flatnonzero(np.diff(positions, prepend=positions[0] - 1))
    heads = rows[firsts]
    saliency, num_layers = counts.reap_NLE, len(counts.layers)
    counts_NX = _add_rows(counts.counts_NLE, rows, firsts, np.int64)
    weights_NX = None if counts.weights_NLE is None else _add_rows(counts.weights_NLE, rows, firsts, np.float64)
    batch = ExampleCounts(
        batch_idx=int(counts.batch_idx[rows[0]]),
        is_unsafe_N=_is_unsafe(counts.label[heads]),
        tokens_N=np.add.reduceat(counts.num_tokens[rows], firsts).astype(np.int64),
        counts_NX=counts_NX,
        weights_NX=weights_NX,
        shared_NX=None if weights_NX is None else shared_by_weight(counts_NX, weights_NX, num_layers),
        pairs_N=None if counts.pair is None else counts.pair[heads],
        reap_NX=None if saliency is None else _add_rows(saliency, rows, firsts, np.float64),
        answers=None if answers is None else answers_of(counts, answers, _is_unsafe(counts.label[answers])),
    )
    safe_tokens = int(batch.tokens_N[~batch.is_unsafe_N].sum())
    unsafe_tokens = int(batch.tokens_N[batch.is_unsafe_N].sum())
    if not (safe_tokens and unsafe_tokens):
        raise InputError(
            f"batch {batch.batch_idx}: got {safe_tokens} safe and {unsafe_tokens} unsafe tokens, expected both; "
            "the batch needs examples of both labels"
        )
    return batch


def shared_by_weight(counts_NX: npt.NDArray[np.int64], weights_NX: Floats, num_layers: int) -> Floats:
    """(N, L*E) each example's routed tokens of a layer, shared out among the layer's experts by routed weight.

    With k experts a token, a routed token counts k times its part of the layer's weight instead of 1. So what a family
    scales its weights by does not matter, a layer still adds up to the tokens routed in it, and where all weights are alike
    each expert has the number of tokens that are routed to it: a difference of 0.05 means the same as one of plain rates.

    Args:
        counts_NX: (N, L*E) tokens routed to each expert.
        weights_NX: (N, L*E) routed weight given to each.
        num_layers: L.
    """
    num_examples = len(counts_NX)
    counts_NLE, weights_NLE = (values.reshape(num_examples, num_layers, -1) for values in (counts_NX, weights_NX))
    total_NL1 = weights_NLE.sum(axis=2, keepdims=True)
    share_NLE = np.divide(weights_NLE, total_NL1, out=np.zeros_like(weights_NLE), where=total_NL1 > 0)
    return np.asarray((share_NLE * counts_NLE.sum(axis=2, keepdims=True)).reshape(num_examples, -1))


def _add_rows(values_NLE: Any, rows: npt.NDArray[np.int64], firsts: npt.NDArray[np.int64], dtype: Any) -> Any:
    """(examples, L*E): the rows of each example added up."""
    chosen = values_NLE[rows].reshape(len(rows), values_NLE[0].size).astype(dtype)
    return chosen if len(firsts) == len(rows) else np.add.reduceat(chosen, firsts, axis=0)


def _is_unsafe(labels: npt.NDArray[np.object_]) -> npt.NDArray[np.bool_]:
    is_unsafe = np.asarray(labels == "unsafe", dtype=bool)
    unknown = set(labels[~is_unsafe]) - {"safe"}
    if unknown:
        raise InputError(
            f"label: got {sorted(map(str, unknown))}, expected 'safe' or 'unsafe'; mend the counts' labels"
        )
    return is_unsafe


def activation_rates(batch: ExampleCounts, layers: Sequence[int]) -> pd.DataFrame:
    """One row per layer and expert of a batch, ordered so: the risk table before anything is said about certainty.

    Returns:
        columns `batch_idx, layer, expert`; `a_safe`, `d_safe`: tokens of safe examples routed / not routed to the
        expert, `a_unsafe`, `d_unsafe` the same for unsafe; `a_safe_n`, `a_unsafe_n`: routed tokens / all tokens
        (fraction 0 to 1); `risk_diff = a_unsafe_n - a_safe_n` (positive = unsafe), rounded once.
    """
    safe_X = batch.counts_NX[~batch.is_unsafe_N].sum(axis=0)
    unsafe_X = batch.counts_NX[batch.is_unsafe_N].sum(axis=0)
    safe_tokens = int(batch.tokens_N[~batch.is_unsafe_N].sum())
    unsafe_tokens = int(batch.tokens_N[batch.is_unsafe_N].sum())
    num_experts = len(safe_X) // len(layers)
    return pd.DataFrame(
        {
            "batch_idx": np.full(len(safe_X), batch.batch_idx),
            "layer": np.repeat(np.asarray(layers), num_experts),
            "expert": np.tile(np.arange(num_experts), len(layers)),
            "a_safe": safe_X,
            "d_safe": safe_tokens - safe_X,
            "a_unsafe": unsafe_X,
            "d_unsafe": unsafe_tokens - unsafe_X,
            "a_safe_n": safe_X / safe_tokens,
            "a_unsafe_n": unsafe_X / unsafe_tokens,
            # One division of whole numbers, not the difference of two rounded rates: experts with equal rates then tie
            # exactly, and which of them is among the top_k is decided by (layer, expert), not by rounding.
            "risk_diff": (unsafe_X * safe_tokens - safe_X * unsafe_tokens) / (unsafe_tokens * safe_tokens),
        }
    )


def add_rates(table: pd.DataFrame) -> pd.DataFrame:
    """A table of token counts (`a_*` routed, `d_*` not routed) with its rates and `risk_diff` computed.

    For counts that come from elsewhere, such as published tables; each row may have its own number of tokens.
    """
    safe, unsafe = table["a_safe"] + table["d_safe"], table["a_unsafe"] + table["d_unsafe"]
    risk_diff = (table["a_unsafe"] * safe - table["a_safe"] * unsafe) / (unsafe * safe)
    return table.assign(a_safe_n=table["a_safe"] / safe, a_unsafe_n=table["a_unsafe"] / unsafe, risk_diff=risk_diff)
