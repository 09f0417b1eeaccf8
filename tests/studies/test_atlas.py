"""The atlas of experts: for which categories each is unsafe, and in how many runs."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from types import SimpleNamespace

import pandas as pd
import pytest

from moe_ray.config import Config
from moe_ray.errors import InputError
from moe_ray.experts import Expert, masks_from_experts
from moe_ray.studies.atlas import expert_atlas

A, B, C = Expert(0, 1), Expert(0, 2), Expert(2, 3)


@dataclass
class Identified:
    """What the atlas reads of a run directory."""

    selected: dict
    by_category: pd.DataFrame
    num_experts: int = 4
    config: Config = field(default_factory=Config)
    folder: object = field(default_factory=lambda: SimpleNamespace(url="runs/x"))

    @property
    def masks(self):
        return masks_from_experts(self.selected, layers=(0, 2), num_experts=self.num_experts)


def rows(*entries):
    columns = ["category", "layer", "expert", "batches", "share", "risk_diff"]
    return pd.DataFrame(
        [(category, *expert, 1, share, diff) for category, expert, share, diff in entries], columns=columns
    )


def two_runs():
    first = Identified(
        {0: (A, B), 1: (A,)}, rows(("fraud", A, 1.0, 0.4), ("fraud", B, 0.5, 0.2), ("theft", A, 1.0, 0.6))
    )
    second = Identified({0: (A, C)}, rows(("fraud", A, 0.5, 0.2), ("theft", C, 1.0, 0.1)))
    return [first, second]


def test_experts_of_most_runs_come_first_with_means_over_the_runs_that_have_them():
    atlas = expert_atlas(two_runs())
    assert [(entry["name"], entry["runs"]) for entry in atlas["experts"]] == [
        ("L00_E01", 2),
        ("L00_E02", 1),
        ("L02_E03", 1),
    ]
    assert atlas["experts"][0]["categories"] == {
        "fraud": {"runs": 2, "share": 0.75, "risk_diff": pytest.approx(0.3)},
        "theft": {"runs": 1, "share": 1.0, "risk_diff": 0.6},
    }
    assert atlas["model"] == {"name": "embedded", "layers": [0, 2], "num_experts": 4}
    assert [run["union_experts"] for run in atlas["runs"]] == [2, 2]


def test_runs_agree_as_much_as_their_unions_overlap():
    (pair,) = expert_atlas(two_runs())["agreement"]
    # One of three experts is shared; by chance 2 x 1 / 4 of layer 0's would be, and 0 x 1 / 4 of layer 2's.
    assert pair == {
        "runs": [0, 1],
        "jaccard": pytest.approx(1 / 3, abs=1e-6),
        "expected": pytest.approx(0.5 / 3.5, abs=1e-6),
        "corrected": pytest.approx((1 / 3 - 1 / 7) / (1 - 1 / 7), abs=1e-6),
    }


def test_one_run_has_nothing_to_agree_with_and_it_is_all_json():
    atlas = expert_atlas(two_runs()[:1])
    assert atlas["agreement"] == []
    assert json.loads(json.dumps(atlas, allow_nan=False)) == atlas


def test_runs_on_other_models_are_refused():
    other = Identified({0: (A,)}, rows(("fraud", A, 1.0, 0.4)), num_experts=8)
    with pytest.raises(InputError, match="2 MoE layers of 8 experts, that of the first run 2 of 4"):
        expert_atlas([two_runs()[0], other])
    with pytest.raises(InputError, match="got no run"):
        expert_atlas([])
