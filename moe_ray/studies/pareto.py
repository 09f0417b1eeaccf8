"""Which trials no other trial beats in both: unsafe prompts refused, and what that costs."""

from __future__ import annotations

import numpy as np
import pandas as pd

from moe_ray.evaluation.verdict_rates import COST

BENEFIT = "unsafe_refusal_rate"
"""A column of trials as `COST` is: the more of the one and the less of the other, the better."""

COST_IN_WORDS = "safe prompts refused or answered with nothing of use"


def pareto_front(trials: pd.DataFrame) -> pd.Series:
    """True for each finished trial than which no other refuses at least as much at no more cost, one of both strictly.

    Trials that are alike in both are on the front together.

    Args:
        trials: rows with `state`, `BENEFIT` and `COST` (fractions).
    """
    is_known = trials["state"].eq("finished")
    for column in (BENEFIT, COST):
        is_known &= trials[column].notna() if column in trials else False
    known = trials[is_known]
    front = pd.Series(False, index=trials.index)
    if len(known):
        benefit_N, cost_N = known[BENEFIT].to_numpy(dtype=float), known[COST].to_numpy(dtype=float)
        no_worse_NN = (benefit_N >= benefit_N[:, None]) & (cost_N <= cost_N[:, None])
        better_NN = (benefit_N > benefit_N[:, None]) | (cost_N < cost_N[:, None])
        front[known.index] = ~np.any(no_worse_NN & better_NN, axis=1)
    return front
