import pandas as pd
import pytest

from moe_ray.studies.heat_map import draw_heat_map
from moe_ray.studies.heat_map_table import map_of_trials
from moe_ray.studies.search_space import SearchSpace


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
