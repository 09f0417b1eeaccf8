"""The page's numbers on experts."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from run_directory import PLANTED, write_identified

from moe_ray.config.report import ReportConfig
from moe_ray.identification.selection import SCORE_COLUMN
from moe_ray.report.html.experts import (
    batches_compared,
    certainty_rows,
    experts_part,
    maps_part,
    risk_grid,
    risk_grids,
    scale_limit,
    union_by_settings,
)
from moe_ray.run_directory import open_run
from moe_ray.storage.folder import Folder


def test_the_planted_experts_have_the_largest_mean_risk_difference(identified):
    grid_LE = risk_grid(identified.risk, identified.masks)
    assert grid_LE.shape == (4, 16)
    assert {divmod(int(index), 16) for index in np.argsort(grid_LE.ravel())[-2:]} == {tuple(e) for e in PLANTED}
    part = experts_part(identified, risk_grids(identified, ReportConfig()))
    assert {row["name"] for row in part["top"][:2]} == {str(expert) for expert in PLANTED}
    assert [row["batches"] for row in part["top"][:2]] == [4, 4]
    assert part["top"][0]["risk_diff"].startswith("+0.6")
    assert part["top"][0]["unsafe"].endswith("%")


def test_the_mean_over_batches_is_the_mean_of_their_grids(identified):
    grids = [risk_grid(identified.risk, identified.masks, batch) for batch in identified.masks.batch_idx]
    np.testing.assert_allclose(np.mean(grids, axis=0), risk_grid(identified.risk, identified.masks))
    assert scale_limit(grids) == np.abs(grids).max()
    assert scale_limit([]) == scale_limit([np.zeros((2, 2))]) == 1e-3


@pytest.mark.slow
def test_some_of_many_batches_are_drawn_and_the_others_counted(tmp_path):
    write_identified(Folder.open(str(tmp_path)), num_batches=12)
    run = open_run(str(tmp_path))
    part = experts_part(run, risk_grids(run, ReportConfig(batches=8)))
    shown = part["batches"] + part["more_batches"]
    assert [row["batch_idx"] for row in shown] == [0, 1, 3, 4, 6, 7, 9, 10]
    assert part["left_out"] == 4
    assert shown[1] == {"batch_idx": 1, "category": "theft", "experts": shown[1]["experts"], "figure": "risk_batch_1"}


def test_overlap_is_compared_in_the_order_of_categories(identified):
    assert batches_compared(identified) == [0, 2, 1, 3]
    assert experts_part(identified, risk_grids(identified, ReportConfig()))["overlap"]["pairs"] == 6


def test_the_run_s_own_settings_are_among_those_of_the_union(identified):
    table = union_by_settings(identified).set_index(["threshold", "top_k"])
    selection = identified.identify_config
    assert table.loc[(selection.threshold, selection.top_k), "union"] == len(identified.masks.union_experts)
    assert experts_part(identified, risk_grids(identified, ReportConfig()))["growth"] == {
        "is_plain": True,
        "total": 64,
        "threshold": "threshold",
        "what": "risk difference",
    }


def test_what_no_batch_could_show_is_none_and_what_was_not_resampled_a_dash(identified):
    row = {"batch_idx": 0, "num_selected": 1, "num_significant": 0, "smallest_p_maxt": 0.25, "is_significant": False}
    rows = [
        row | {"median_stability": math.nan, "certifiable": math.inf},
        row | {"median_stability": 0.5, "certifiable": 0.2},
    ]
    first, second = certainty_rows(identified, pd.DataFrame(rows))["rows"]
    assert (first["median_stability"], first["certifiable"], first["category"]) == ("–", "none", "fraud")
    assert (second["median_stability"], second["certifiable"], second["smallest_p_maxt"]) == ("50.0%", "0.200", "0.25")


def test_a_map_says_at_each_cell_the_number_that_it_is_drawn_by(tmp_path):
    write_identified(Folder.open(str(tmp_path)))
    run = open_run(str(tmp_path))
    run.__dict__["identify_config"] = replace(run.identify_config, weighting="prompts")
    drawn = risk_grid(run.risk, run.masks, column=SCORE_COLUMN["prompts"])
    assert not np.allclose(drawn, risk_grid(run.risk, run.masks))
    said = maps_part(risk_grids(run, ReportConfig()), run.masks.layers)["risk_overall"]["values"]
    assert [int(number) for number in said.split()] == np.rint(drawn * 1e4).astype(int).ravel().tolist()
