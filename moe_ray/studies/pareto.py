"""Which trials no other trial beats in both: unsafe prompts refused, and what that costs."""

from __future__ import annotations

import numpy as np
import pandas as pd

from moe_ray.evaluation.verdict_rates import COST

BENEFIT = "unsafe_refusal_rate"
"""A column of trials as `COST` is: the more of the one and the less of the other, the better."""

COST_IN_WORDS = "safe prompts refused or answered with nothing of use"


def cost_of(trials: pd.DataFrame) -> pd.Series:
    """The cost of each trial; of trials from before answers were told apart by kind, the safe prompts that are refused."""
    return trials[COST] if COST in trials else trials["safe_refusal_rate"].rename(COST)


def pareto_front(trials: pd.DataFrame) -> pd.Series:
    """True for each finished trial than which no other refuses at least as much at no more cost, one of both strictly.

    Trials that are alike in both are on the front together.

    Args:
        trials: rows with `state`, `BENEFIT` and `COST` (fractions).
    """
    if BENEFIT not in trials:
        return pd.Series(False, index=trials.index)
    trials = trials.assign(**{COST: cost_of(trials)})
    is_known = trials["state"].eq("finished") & trials[BENEFIT].notna() & trials[COST].notna()
    known = trials[is_known]
    front = pd.Series(False, index=trials.index)
    if len(known):
        benefit_N, cost_N = known[BENEFIT].to_numpy(dtype=float), known[COST].to_numpy(dtype=float)
        no_worse_NN = (benefit_N >= benefit_N[:, None]) & (cost_N <= cost_N[:, None])
        better_NN = (benefit_N > benefit_N[:, None]) | (cost_N < cost_N[:, None])
        front[known.index] = ~np.any(no_worse_NN & better_NN, axis=1)
    return front
