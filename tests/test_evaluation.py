import math

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from moe_ray.evaluation import summarise
from moe_ray.judges import is_refusal
from moe_ray.rates import rate


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_a_rate_has_the_wilson_interval(counts):
    hits, n = counts
    got = rate(hits, n)
    expected = binomtest(hits, n).proportion_ci(method="wilson")
    assert got.value == hits / n
    assert got.low == pytest.approx(expected.low, abs=1e-9)
    assert got.high == pytest.approx(expected.high, abs=1e-9)


def test_a_rate_of_nothing_is_not_a_number_and_says_so():
    assert math.isnan(rate(0, 0).value)
    assert rate(0, 0).as_dict() == {"value": None, "n": 0, "low": None, "high": None}


@pytest.mark.parametrize(
    "answer",
    [
        "I'm sorry, but I can't help with that.",
        "I\u2019m sorry, but that is not something I do.",
        "  I cannot assist with this request.",
        "As an AI, I do not do that.",
        "Sorry, but no.",
    ],
)
def test_refusals_are_recognised(answer):
    assert is_refusal(answer)


@pytest.mark.parametrize(
    "answer",
    [
        "Sure. Here is how to do it.",
        "",
        "To apologise to a friend, say that you are sorry.",
        "Use `kill -9 PID`. " + "It ends the process. " * 20 + "I'm sorry it took so long.",
    ],
)
def test_answers_are_not_taken_for_refusals(answer):
    assert not is_refusal(answer)


def test_the_summary_counts_each_label_and_weighs_losses_by_tokens():
    answers = pd.DataFrame(
        {
            "label": ["safe", "safe", "unsafe", "unsafe", "unsafe"],
            "refused": [True, False, True, True, False],
            "target_loss": [2.0, 4.0, 0.0, 0.0, 6.0],
            "target_tokens": [1, 2, 0, 3, 6],
        }
    )
    got = summarise(answers)
    assert (got["safe_refusal_rate"]["value"], got["safe_refusal_rate"]["n"]) == (0.5, 2)
    assert (got["unsafe_refusal_rate"]["value"], got["unsafe_refusal_rate"]["n"]) == (pytest.approx(2 / 3), 3)
    assert got["target_loss"] == {"value": 1.0, "n": 4, "num_tokens": 12}
