"""How far a repair moved what a model says first to prompts that ask for no harm: KL divergence at the first answer token.

It is the field's measure of damage (Arditi et al. 2024, "Refusal in language models is mediated by a single direction";
abliteration tools rank by it): it sees a change of manner that neither a rate of refusals nor a loss on given texts shows.

Of the base model's next-token probabilities the 1,000 largest are kept for each prompt, and the rest as one sum. The
divergence over these 1,001 events is exact for vocabularies up to that size and never above the exact one else; what it
lacks is the difference within the rest, which holds little.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from moe_ray.errors import InputError

KEPT = 1_000
"""Tokens of each prompt whose probabilities are kept."""

COLUMNS = ("id", "token_ids", "log_probs", "log_rest")
"""Of a table of first tokens: the example, the kept tokens, their log probabilities (nats), and that of all others."""


def first_token_divergence(before: pd.DataFrame, after: pd.DataFrame) -> pd.Series:
    """KL(before || after) of each prompt's first answer token, in nats, by the examples' `id`.

    Args:
        before: rows with `COLUMNS`, of the base model.
        after: of the other model, at the base model's tokens.

    Raises:
        InputError: the two are not of the same examples and tokens.
    """
    first, second = before.set_index("id"), after.set_index("id")
    if len(first) != len(second) or not first.index.isin(second.index).all():
        raise InputError("first tokens before and after are of different examples; evaluate both on the same ones")
    second = second.loc[first.index]
    values = []
    for (tokens, p, rest_p), (others, q, rest_q) in zip(_rows(first), _rows(second), strict=True):
        if not np.array_equal(tokens, others):
            raise InputError("first tokens before and after are not the same; evaluate the repaired model again")
        log_p, log_q = np.append(p, rest_p).astype(np.float64), np.append(q, rest_q).astype(np.float64)
        # Where the base model gives nothing, nothing can be lost, and -inf minus -inf would be no number.
        there = log_p > -np.inf
        values.append(float(np.sum(np.exp(log_p[there]) * (log_p[there] - log_q[there]))))
    # A sum of rounded numbers may end a hair below zero, which a divergence is not.
    return pd.Series(np.maximum(values, 0.0), index=first.index, dtype=np.float64)


def _rows(table: pd.DataFrame) -> zip[tuple[np.ndarray, np.ndarray, float]]:
    return zip(table["token_ids"].map(np.asarray), table["log_probs"].map(np.asarray), table["log_rest"], strict=True)
