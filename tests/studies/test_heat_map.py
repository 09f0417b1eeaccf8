import numpy as np
import pandas as pd
import pytest

from moe_ray.studies.heat_map import bounded_heat_map, draw_heat_map, heat_map_axes, heat_map_table, map_of_trials
from moe_ray.studies.search_space import Range, SearchSpace


def test_threshold_and_top_k_are_the_axes_where_both_are_searched():
    space = SearchSpace({"finetune.epochs": (1, 2), "identify.top_k": (5,), "identify.threshold": (0.1,)})
    assert heat_map_axes(space) == ("identify.threshold", "identify.top_k")
    assert heat_map_axes(SearchSpace({"finetune.epochs": (1, 2)})) == ("finetune.epochs", "finetune.epochs")
    other = SearchSpace({"finetune.epochs": (1,)}, {"finetune.learning_rate": Range("uniform", 0.1, 0.2)})
    assert heat_map_axes(other) == ("finetune.epochs", "finetune.learning_rate")


def test_a_cell_holds_the_best_of_its_trials_and_none_where_there_is_no_trial():
    trials = pd.DataFrame({"x": [0.1, 0.1, 0.02, 0.02], "y": [5, 5, 10, 5], "objective": [0.3, 0.7, 0.2, -0.5]})
    table = heat_map_table(trials, "x", "y")
    assert list(table.columns) == [0.02, 0.1]
    assert list(table.index) == [10, 5]
    np.testing.assert_array_equal(table.to_numpy(), [[0.2, np.nan], [-0.5, 0.7]])


def test_many_values_are_cut_into_ranges_that_lose_no_trial():
    values = np.linspace(1e-4, 1e-2, 40)
    trials = pd.DataFrame({"x": values, "y": ["a"] * 40, "objective": np.arange(40.0)})
    table = heat_map_table(trials, "x", "y")
    assert table.shape == (1, 6)
    assert table.to_numpy().max() == 39
    assert not np.isnan(table.to_numpy()).any()


@pytest.mark.slow
def test_the_picture_prints_every_value_and_is_the_same_every_time():
    space = SearchSpace({"threshold": (1, 2), "top_k": (3, 4)})
    trials = pd.DataFrame({"threshold": [1, 2, 1, 2], "top_k": [3, 3, 4, 4], "objective": [0.125, 0.25, 0.5, 9.0]})
    trials = trials.assign(is_within_bound=[True, False, True, True], state=["finished"] * 3 + ["stopped"])
    shown = map_of_trials(trials, space, {"threshold": 1, "top_k": 4})
    first, second = (draw_heat_map(shown, title="t") for _ in range(2))
    assert first["png"].startswith(b"\x89PNG")
    assert first["png"] == second["png"]
    svg = first["svg"].decode()
    assert all(text in svg for text in ("0.125", "0.250*", "0.500", "–", "threshold", "top_k"))
    assert "9.000" not in svg


def test_a_cell_shows_what_stays_within_the_bound_and_stars_what_does_not():
    trials = pd.DataFrame(
        {
            "x": [1, 1, 2, 3],
            "y": [5, 5, 5, 6],
            "objective": [0.9, 0.4, 0.8, 0.3],
            "is_within_bound": [False, True, False, True],
        }
    )
    table, over = bounded_heat_map(trials, "x", "y")
    np.testing.assert_array_equal(table.to_numpy(), [[np.nan, np.nan, 0.3], [0.4, 0.8, np.nan]])
    np.testing.assert_array_equal(over.to_numpy(), [[False, False, False], [False, True, False]])
