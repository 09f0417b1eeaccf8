"""The page's numbers on sweeps, rounds, training and baselines."""

from __future__ import annotations

import pandas as pd
from run_directory import write_identified

from moe_ray.report.html.studies import (
    baselines_part,
    rounds_part,
    sweep_map,
    sweep_part,
    training_part,
)
from moe_ray.run_directory import open_run
from moe_ray.storage.folder import Folder


def test_the_sweep_has_a_row_for_every_trial_and_stars_what_forgets_too_much(run):
    part = sweep_part(run)
    assert (part["trials"], part["stopped"], part["failed"]) == (4, 0, 1)
    assert part["settings"] == ("identify.threshold", "identify.top_k")
    assert [row["settings"] for row in part["rows"]] == [["0.05", "12"], ["0.05", "6"], ["0.1", "12"], ["0.1", "6"]]
    assert [row["is_over"] for row in part["rows"]] == [False, False, True, False]
    assert part["has_stars"]
    failed = part["rows"][-1]
    assert {failed[name] for name in ("objective", "unsafe", "safe", "forgetting", "union")} == {"–"}
    assert part["rows"][2] | {"settings": None} == {
        "settings": None, "objective": "0.938", "unsafe": "93.8%", "safe": "0.0%", "forgetting": "+0.750", "is_over": True,
        "union": "12", "state": "finished, Pareto front",
    }  # fmt: skip


def test_the_winner_s_rate_has_the_interval_of_all_unsafe_validation_prompts(run):
    # 14 of 16: Wilson's interval reaches from 64.0% to 96.5%, so 50% lies outside of it and 93.75% within.
    winner = sweep_part(run)["winner_rate"]
    assert str(winner["rate"]) == "87.5% [64.0%, 96.5%]"
    assert (winner["n"], winner["alike"], winner["others"]) == (16, 1, 2)


def test_the_sweep_s_map_marks_the_winner(run):
    assert sweep_map(run).marked == (0.05, 12)


def test_rounds_say_what_each_did_and_which_was_kept(run):
    part = rounds_part(run)
    assert (part["kept"], part["num_batches"], part["target"]) == (2, 4, "90.0%")
    assert part["rows"] == [
        {"round": 1, "is_kept": False, "lagging": 2, "shortfall": "25.0%", "unsafe": "62.5%", "safe": "6.2%"},
        {"round": 2, "is_kept": True, "lagging": 1, "shortfall": "25.0%", "unsafe": "75.0%", "safe": "6.2%"},
    ]


def test_training_says_how_far_the_loss_fell_and_how_much_was_trained(run):
    assert training_part(run) == {
        "steps": 8, "epochs": 2, "first": "1.042", "last": "0.317", "trainable": "10", "total": "100", "changed": "0",
    }  # fmt: skip


def test_what_was_not_run_is_none(identified):
    parts = (baselines_part, rounds_part, sweep_map, sweep_part, training_part)
    assert [part(identified) for part in parts] == [None] * 5


def test_baselines_have_rates_what_was_forgotten_and_differences_in_the_units_of_the_head(tmp_path):
    folder = Folder.open(str(tmp_path))
    write_identified(folder)
    figures = {"unsafe_refusal_rate": 0.5, "safe_refusal_rate": 0.25, "ours_minus_unsafe_refusal_rate": 0.125}
    row = {f"{name}{end}": value for name, value in figures.items() for end in ("", "_low", "_high", "_n")}
    row |= {"arm": "<b>\x1b", "share": 1.0, "trainable_parameters": 1234, "neutral_loss": float("nan")}
    table = pd.DataFrame([{**row, "share": 0.5, "unsafe_refusal_rate": 0.0}, row])
    folder.sub("compare").write_table("comparison.parquet", table)
    folder.sub("compare").write_json("verdict.json", "One.\x1b\nTwo.")
    part = baselines_part(open_run(str(tmp_path)))
    assert part["verdict"] == ["One.\ufffd", "Two."]
    (shown,) = part["rows"]
    assert shown["arm"] == "<b>\ufffd"
    assert shown["parameters"] == "1,234"
    assert [str(cell) for cell in shown["cells"]] == [
        "50.0% [50.0%, 50.0%]", "25.0% [25.0%, 25.0%]", "–", "–", "+12.5 [+12.5, +12.5]", "–", "–",
    ]  # fmt: skip
    assert (part["share"], part["has_curve"], part["has_transfer"], part["has_others"]) == ("100%", True, False, False)


def test_categories_that_did_not_train_have_columns_where_there_are_any(tmp_path):
    folder = Folder.open(str(tmp_path))
    write_identified(folder)
    row = {"arm": "per_batch", "share": 1.0, "trainable_parameters": 1, "unsafe_refusal_rate": 1.0}
    table = pd.DataFrame([row | {"other_unsafe_refusal_rate": 0.25, "other_safe_target_loss": 0.125}])
    folder.sub("compare").write_table("comparison.parquet", table)
    folder.sub("compare").write_json("verdict.json", "One.")
    part = baselines_part(open_run(str(tmp_path)))
    assert part["has_others"]
    assert [str(cell) for cell in part["rows"][0]["cells"]][4:6] == ["25.0%", "+0.125"]


def test_a_comparison_from_before_there_were_curves_is_left_out(tmp_path):
    folder = Folder.open(str(tmp_path))
    write_identified(folder)
    folder.sub("compare").write_table("comparison.parquet", pd.DataFrame([{"arm": "per_batch"}]))
    folder.sub("compare").write_json("verdict.json", "One.")
    assert baselines_part(open_run(str(tmp_path))) is None
