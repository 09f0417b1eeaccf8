import numpy as np
import pandas as pd

from moe_ray.studies.heat_map_table import bounded_heat_map, heat_map_axes, heat_map_table, map_of_trials
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


def test_the_winner_s_cell_is_marked_also_where_its_value_is_shown_as_a_range():
    rates = np.linspace(1e-4, 1e-2, 40)
    trials = pd.DataFrame({"rate": rates, "routing": "masked", "objective": rates, "is_within_bound": True})
    trials = trials.assign(state="finished")
    space = SearchSpace({"routing": ("masked",)}, {"rate": Range("uniform", 1e-4, 1e-2)})
    column, row = map_of_trials(trials, space, {"rate": float(rates[-1]), "routing": "masked"}).marked
    assert column == "masked"
    assert heat_map_table(trials, "routing", "rate").loc[row, column] == rates[-1]


def test_the_winner_s_cell_is_marked_by_its_numbers():
    trials = pd.DataFrame({"identify.threshold": [0.05, 0.1], "identify.top_k": [6, 12], "objective": [0.5, 0.25]})
    trials = trials.assign(is_within_bound=True, state=["finished", "stopped"])
    space = SearchSpace({"identify.threshold": (0.05, 0.1), "identify.top_k": (6, 12)})
    assert map_of_trials(trials, space, {"identify.threshold": 0.05, "identify.top_k": 6}).marked == (0.05, 6)
    assert map_of_trials(trials, space, {"identify.threshold": 0.1, "identify.top_k": 12}).marked is None
