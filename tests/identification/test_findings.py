"""What tasks say of their batches, joined, is what the whole table says."""

from __future__ import annotations

import pandas as pd
import pytest
from prompt_tokens import by_prompt_tokens

from moe_ray.errors import NothingSelected
from moe_ray.experts import Expert
from moe_ray.identification.confounds import weighting_agreement
from moe_ray.identification.findings import findings_of, joined
from moe_ray.identification.identify import certainty_per_batch, identify
from moe_ray.identification.selection import select
from moe_ray.testing.simulated_counts import Population, simulate

SHAPE = {"layers": (0, 1, 2, 3), "num_experts": 16}


@pytest.mark.parametrize("permutations", [0, 200])
def test_parts_joined_in_any_order_are_the_whole(permutations: int) -> None:
    config = by_prompt_tokens(permutations=permutations, resamples=20, threshold=0.15)
    risk = identify(simulate(Population(), num_batches=5, planted=(Expert(1, 3),), shift=0.4), config)
    parts = [risk[risk["batch_idx"].isin(batches)] for batches in ((3, 4), (0, 1, 2))]
    found = joined([findings_of(part, config, seed=3) for part in parts], config, **SHAPE)
    masks = select(risk, config, seed=3)
    assert found.masks.digest() == masks.digest()
    assert dict(found.masks.selected) == dict(masks.selected)
    expected = certainty_per_batch(risk, masks, config)
    pd.testing.assert_frame_equal(found.certainty[expected.columns], expected)
    largest = risk.groupby("batch_idx")["risk_diff"].max()
    assert found.certainty["largest_risk_diff"].tolist() == largest.tolist()
    assert found.certainty["jaccard"].tolist() == weighting_agreement(risk, config)["jaccard"].tolist()


def test_a_batch_without_experts_keeps_its_place_and_none_at_all_is_an_error() -> None:
    risk = identify(simulate(Population(), num_batches=3, seed=1), by_prompt_tokens(permutations=0, resamples=0))
    largest = sorted(risk.groupby("batch_idx")["risk_diff"].max())
    config = by_prompt_tokens(permutations=0, resamples=0, threshold=(largest[0] + largest[1]) / 2)
    parts = [findings_of(table, config, seed=0) for _, table in risk.groupby("batch_idx")]
    found = joined(parts, config, **SHAPE)
    assert found.masks.batch_idx == (0, 1, 2)
    assert len(found.masks.trained_batches) == 2
    strict = by_prompt_tokens(permutations=0, resamples=0, threshold=0.9)
    with pytest.raises(NothingSelected, match=f"the largest is {largest[-1]:.4f}; lower identify.threshold"):
        joined([findings_of(risk, strict, seed=0)], strict, **SHAPE)
