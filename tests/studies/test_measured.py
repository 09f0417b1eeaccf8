"""What a trial measured is named by its size: answers to unsafe prompts get into no log by accident."""

import pandas as pd
import pytest

from moe_ray.studies.measured import Measured

ANSWERS = pd.DataFrame({"answer": ["how it is done", "no", "no"]})


@pytest.mark.parametrize(
    ("neutral", "said"),
    [
        (pd.DataFrame({"loss": [1.0, 2.0]}), "Measured(3 answers, 2 neutral texts)"),
        (None, "Measured(3 answers, 0 neutral texts)"),
    ],
)
def test_it_is_shown_by_how_much_was_measured_and_never_by_what_was_answered(neutral, said):
    measured = Measured(answers=ANSWERS, neutral=neutral)
    assert f"{measured}" == repr(measured) == said
