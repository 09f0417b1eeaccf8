"""Risk differences: how much more often an expert is routed on unsafe tokens than on safe ones, batch by batch.

Shape suffixes: N examples and roles, L MoE layers, E experts.

Source: the activation rates and their difference of SteerMoE (Fayyaz et al. 2025, "Steering MoE LLMs via Expert
(De)Activation", risk difference), computed per batch instead of once over all prompts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd

from moe_ray.errors import InputError
from moe_ray.routing import RoutingCounts

RISK_COLUMNS = (
    "batch_idx", "layer", "expert", "a_safe", "d_safe", "a_unsafe", "d_unsafe", "a_safe_n", "a_unsafe_n", "risk_diff",
)  # fmt: skip


def risk_differences(counts: RoutingCounts, *, roles: Sequence[str] = ("prompt",)) -> pd.DataFrame:
    """One row per batch, layer and expert, ordered so.

    Args:
        counts: routing counts.
        roles: which tokens count: `prompt`, `response` or both.

    Returns:
        columns `batch_idx, layer, expert`; `a_safe`, `d_safe`: tokens of safe examples routed / not routed to the
        expert, `a_unsafe`, `d_unsafe` the same for unsafe; `a_safe_n`, `a_unsafe_n`: routed tokens / all tokens
        (fraction 0 to 1); `risk_diff = a_unsafe_n - a_safe_n` (positive = unsafe).

    Raises:
        InputError: a batch has no token of one label in these roles.
    """
    chosen = counts.take(np.isin(counts.role.astype(str), list(roles)))
    if not len(chosen):
        raise InputError(
            f"no routing counts of role {' or '.join(roles)}; got {sorted(set(counts.role))}; change selection.roles or "
            "give examples a response"
        )
    tables = [_batch_table(chosen, int(batch_idx)) for batch_idx in np.unique(chosen.batch_idx)]
    return pd.concat(tables, ignore_index=True)


def _batch_table(counts: RoutingCounts, batch_idx: int) -> pd.DataFrame:
    in_batch_N = counts.batch_idx == batch_idx
    a_safe_LE, safe_tokens = _routed(counts, in_batch_N & (counts.label == "safe"))
    a_unsafe_LE, unsafe_tokens = _routed(counts, in_batch_N & (counts.label == "unsafe"))
    if not (safe_tokens and unsafe_tokens):
        raise InputError(
            f"batch {batch_idx}: got {safe_tokens} safe and {unsafe_tokens} unsafe tokens, expected both; "
            "the batch needs examples of both labels"
        )
    num_layers, num_experts = a_safe_LE.shape
    a_safe, a_unsafe = a_safe_LE.ravel(), a_unsafe_LE.ravel()
    a_safe_n, a_unsafe_n = a_safe / safe_tokens, a_unsafe / unsafe_tokens
    return pd.DataFrame(
        {
            "batch_idx": np.full(a_safe.size, batch_idx),
            "layer": np.repeat(np.asarray(counts.layers), num_experts),
            "expert": np.tile(np.arange(num_experts), num_layers),
            "a_safe": a_safe,
            "d_safe": safe_tokens - a_safe,
            "a_unsafe": a_unsafe,
            "d_unsafe": unsafe_tokens - a_unsafe,
            "a_safe_n": a_safe_n,
            "a_unsafe_n": a_unsafe_n,
            "risk_diff": a_unsafe_n - a_safe_n,
        }
    )


def _routed(counts: RoutingCounts, rows_N: npt.NDArray[np.bool_]) -> tuple[npt.NDArray[np.int64], int]:
    """(L, E) routed tokens of the rows, and their number of tokens."""
    return counts.counts_NLE[rows_N].sum(axis=0, dtype=np.int64), int(counts.num_tokens[rows_N].sum())


def aggregate_risk(risk: pd.DataFrame) -> pd.DataFrame:
    """One row per layer and expert over all batches, the largest mean `risk_diff` first, ties by (layer, expert).

    Columns: `layer, expert`; the means over batches `risk_diff, a_safe_n, a_unsafe_n`; `risk_diff_sum`, the sum over
    batches; `num_batches`.
    """
    grouped = risk.groupby(["layer", "expert"], sort=True)
    table = grouped[["risk_diff", "a_safe_n", "a_unsafe_n"]].mean()
    table["risk_diff_sum"] = grouped["risk_diff"].sum()
    table["num_batches"] = grouped.size()
    return table.reset_index().sort_values(
        ["risk_diff", "layer", "expert"], ascending=[False, True, True], ignore_index=True
    )
