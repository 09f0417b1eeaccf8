"""Random masks and risk tables of a small model, for what is made of them."""

from __future__ import annotations

import numpy as np
import pandas as pd
from hypothesis import strategies as st

from moe_ray.experts import Expert, masks_from_experts

LAYERS, NUM_EXPERTS = (1, 2, 4), 6
EVERYTHING = [Expert(layer, expert) for layer in LAYERS for expert in range(NUM_EXPERTS)]


def risk_table(batches, seed=0, *, weights=False):
    """A row per batch and expert; with the columns that a risk table need not have where `weights`."""
    rng = np.random.default_rng(seed)
    rows = [(batch, *expert) for batch in batches for expert in EVERYTHING]
    table = pd.DataFrame(rows, columns=["batch_idx", "layer", "expert"])
    for name in ("a_safe", "a_unsafe"):
        table[name] = rng.integers(1, 100, len(table))
    table["d_safe"], table["d_unsafe"] = 300, 300
    table["a_safe_n"], table["a_unsafe_n"] = table["a_safe"] / 300, table["a_unsafe"] / 300
    table["risk_diff"] = table["a_unsafe_n"] - table["a_safe_n"]
    if weights:
        table["w_unsafe"], table["reap"] = rng.random((2, len(table)))
    return table


@st.composite
def masks_of_batches(draw, min_trained=2):
    """Masks of some batches, one more of which has no expert."""
    names = draw(st.lists(st.integers(0, 50), min_size=min_trained, max_size=6, unique=True))
    some = st.lists(st.sampled_from(EVERYTHING), min_size=1, max_size=len(EVERYTHING), unique=True)
    selected = {batch: draw(some) for batch in sorted(names)}
    untrained = max(names) + 1
    return masks_from_experts({**selected, untrained: ()}, layers=LAYERS, num_experts=NUM_EXPERTS)
