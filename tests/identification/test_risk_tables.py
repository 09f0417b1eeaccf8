"""A risk table in parts reads as the table does: a batch, a mean, a maximum, to the last digit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from prompt_tokens import by_prompt_tokens

from moe_ray.errors import InputError
from moe_ray.experts import Expert
from moe_ray.identification.confounds import weighting_agreement
from moe_ray.identification.identify import certainty_per_batch, identify
from moe_ray.identification.overlap import expert_categories, sweep_union
from moe_ray.identification.risk_tables import (
    RiskParts,
    aggregate_risk,
    batch_table,
    batch_tables,
    mean_by_category,
    part_name,
    shape_of,
    write_part,
)
from moe_ray.identification.selection import select
from moe_ray.storage.folder import Folder
from moe_ray.testing.simulated_counts import Population, simulate

SETTINGS = by_prompt_tokens(permutations=200, resamples=20)
CATEGORIES = {0: "fraud", 1: "theft", 2: "fraud", 3: "theft", 4: "fraud", 5: "fraud", 6: "theft"}


@pytest.fixture(scope="module")
def risk() -> pd.DataFrame:
    return identify(simulate(Population(), num_batches=7, planted=(Expert(1, 3),), shift=0.4), SETTINGS)


@pytest.fixture(scope="module")
def parts(risk: pd.DataFrame, tmp_path_factory: pytest.TempPathFactory) -> RiskParts:
    """Three parts of unlike size, written in another order."""
    folder = Folder.open(str(tmp_path_factory.mktemp("run") / "risk_differences.parquet"))
    for batches in ((5, 6), (0, 1, 2), (3, 4)):
        write_part(folder, risk[risk["batch_idx"].isin(batches)])
    return RiskParts(folder)


def test_all_parts_are_the_table_also_for_pandas_alone(risk: pd.DataFrame, parts: RiskParts) -> None:
    pd.testing.assert_frame_equal(parts.frame(), risk)
    pd.testing.assert_frame_equal(pd.read_parquet(parts.folder.path), risk)
    assert parts.columns == tuple(risk.columns)
    assert parts.names == [part_name(batches) for batches in ((0, 1, 2), (3, 4), (5, 6))]
    assert "q" in parts
    assert "w_unsafe" not in parts
    assert shape_of(parts) == shape_of(risk) == ([0, 1, 2, 3], 16)


def test_every_batch_is_read_alone(risk: pd.DataFrame, parts: RiskParts) -> None:
    for (batch, table), (other, expected) in zip(parts.tables(), batch_tables(risk), strict=True):
        assert batch == other
        pd.testing.assert_frame_equal(table, expected.reset_index(drop=True))
        pd.testing.assert_frame_equal(batch_table(parts, batch), table)
    with pytest.raises(InputError, match="no risk table of batch 7 in"):
        parts.batch(7)


def test_only_wanted_columns_are_read(parts: RiskParts) -> None:
    _, table = next(parts.tables(["q"]))
    assert list(table.columns) == ["batch_idx", "layer", "expert", "q"]


@pytest.mark.slow
def test_what_reads_risk_says_the_same_of_parts_and_table(risk: pd.DataFrame, parts: RiskParts) -> None:
    masks = select(risk, SETTINGS)
    assert select(parts, SETTINGS).digest() == masks.digest()
    pd.testing.assert_frame_equal(aggregate_risk(parts), aggregate_risk(risk))
    pd.testing.assert_frame_equal(
        certainty_per_batch(parts, masks, SETTINGS), certainty_per_batch(risk, masks, SETTINGS)
    )
    pd.testing.assert_frame_equal(weighting_agreement(parts, SETTINGS), weighting_agreement(risk, SETTINGS))
    pd.testing.assert_frame_equal(
        expert_categories(parts, masks, CATEGORIES), expert_categories(risk, masks, CATEGORIES)
    )
    settings = {"thresholds": [0.0, 0.1], "top_ks": [2, 50]}
    pd.testing.assert_frame_equal(sweep_union(parts, **settings), sweep_union(risk, **settings))


def test_means_are_those_of_pandas_to_the_last_digit(risk: pd.DataFrame, parts: RiskParts) -> None:
    grouped = risk.groupby(["layer", "expert"])["risk_diff"]
    found = aggregate_risk(parts).set_index(["layer", "expert"]).sort_index()
    pd.testing.assert_series_equal(found["risk_diff"], grouped.mean())
    np.testing.assert_array_equal(found["risk_diff"].to_numpy(), grouped.mean().to_numpy())
    fraud = [batch for batch, category in CATEGORIES.items() if category == "fraud"]
    of_fraud = risk[risk["batch_idx"].isin(fraud)].groupby(["layer", "expert"])["risk_diff"].mean()
    means = mean_by_category(parts, CATEGORIES)
    np.testing.assert_array_equal(means.loc[means["category"] == "fraud", "risk_diff"].to_numpy(), of_fraud.to_numpy())


def test_aggregate_has_sums_and_means_over_batches() -> None:
    # Two batches of one layer with three experts; a label's tokens are those routed and not routed to an expert.
    rows = [
        (0, 4, 0, 3, 2, 1),
        (0, 4, 1, 3, 0, 3),
        (0, 4, 2, 1, 2, 3),
        (9, 4, 0, 5, 3, 0),
        (9, 4, 1, 4, 2, 2),
        (9, 4, 2, 3, 5, 1),
    ]
    risk = pd.DataFrame(rows, columns=["batch_idx", "layer", "expert", "a_safe", "a_unsafe", "d_unsafe"])
    risk["d_safe"] = 8 - risk["a_safe"]
    risk["a_safe_n"] = risk["a_safe"] / 8
    risk["a_unsafe_n"] = risk["a_unsafe"] / (risk["a_unsafe"] + risk["d_unsafe"])
    risk["risk_diff"] = risk["a_unsafe_n"] - risk["a_safe_n"]
    table = aggregate_risk(risk).set_index("expert")
    assert table.index[0] == 2
    assert table.loc[2, "risk_diff"] == pytest.approx((2 / 5 - 1 / 8 + 5 / 6 - 3 / 8) / 2)
    assert table.loc[2, "risk_diff_sum"] == pytest.approx(2 / 5 - 1 / 8 + 5 / 6 - 3 / 8)
    assert table.loc[2, ["a_safe_sum", "d_safe_sum", "a_unsafe_sum", "d_unsafe_sum"]].tolist() == [4, 12, 7, 4]
    assert table.loc[2, "risk_diff_pooled"] == pytest.approx(7 / 11 - 4 / 16)
    assert table["num_batches"].tolist() == [2, 2, 2]


def test_a_folder_without_parts_is_an_error(tmp_path: Path) -> None:
    empty = RiskParts(Folder.open(str(tmp_path)))
    with pytest.raises(InputError, match="no part of a risk table"):
        aggregate_risk(empty)
