"""Answers that an engine generated are kept whole, by example and sample."""

import pandas as pd
import pytest

from moe_ray.errors import InputError
from moe_ray.evaluation.generated import Generated, without_generated, write_generated
from moe_ray.models.generation import Response


def test_generated_answers_come_back_as_they_were(folder):
    rows = pd.DataFrame({"id": ["a", "b", "a"], "sample": [0, 0, 1], "label": "safe"}, index=[4, 5, 6])
    responses = [
        Response([1, 2, 9], "Bread.", True),
        Response([3], "", False, num_thought=1, thought="Hm", is_unclosed=True),
        Response([5, 9], "No.", True, num_thought=1, thought="Hm"),
    ]
    write_generated(folder, rows.iloc[:2], responses[:2])
    assert without_generated(rows, folder)["sample"].tolist() == [1]
    with pytest.raises(InputError, match=r"no generated answer to 1 of 3 rows in .* such as 'a'"):
        Generated(folder)(rows)
    write_generated(folder, rows.iloc[2:], responses[2:])
    assert Generated(folder)(rows.iloc[::-1]) == responses[::-1]
    assert without_generated(rows, folder).empty
