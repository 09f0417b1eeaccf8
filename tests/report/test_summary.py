"""The summary's plain values."""

from __future__ import annotations

import json

import pandas as pd

from moe_ray.experts import Expert, masks_from_experts
from moe_ray.report.summary import build_summary


def test_it_names_experts_layers_and_batches_and_is_plain_json():
    masks = masks_from_experts(
        {0: (Expert(2, 1), Expert(2, 3)), 7: (), 9: (Expert(5, 0),)}, layers=(2, 5), num_experts=4
    )
    summary = build_summary(
        masks=masks,
        num_examples=4,
        num_experts_per_tok=2,
        tuned={"trainable_parameters": 3, "total_parameters": 10, "frozen_parameters_changed": 0},
        before={"unsafe_refusal_rate": None},
        after={},
        change={},
        certainty=pd.DataFrame({"batch_idx": [0, 7, 9], "is_significant": [True, False, None]}, dtype=object),
    )
    assert json.loads(json.dumps(summary)) == summary
    assert summary["per_batch_unsafe_experts"] == {"0": ["L02_E01", "L02_E03"], "7": [], "9": ["L05_E00"]}
    assert summary["empty_layers_per_batch"] == {"0": [5], "7": [2, 5], "9": [2]}
    assert summary["short_layers_per_batch"] == {"0": [], "7": [], "9": [5]}
    assert summary["untrained_batches"] == [7]
    assert summary["batches_without_significance"] == [7]
    assert (summary["num_layers"], summary["num_experts"], summary["union_experts"]) == (2, 4, 3)
    assert summary["pairs"] is None
