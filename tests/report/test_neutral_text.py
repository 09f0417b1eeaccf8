"""Whether forgetting can be measured on the neutral text."""

import math

import pytest

from moe_ray.report.neutral_text import unknown_text


def of(value):
    return {"neutral_loss": {"value": value, "n": 9, "low": value, "high": value}}


def test_a_loss_above_that_of_a_guess_cannot_show_forgetting():
    (sentence,) = unknown_text(of(10.61), math.log(1536))
    assert sentence == (
        "The base model does not know the neutral text (10.61 nats per token; a guess among all tokens alike costs 7.34): "
        "forgetting cannot be measured on it."
    )


@pytest.mark.parametrize(
    ("before", "uniform"), [(of(1.1), 7.34), (of(10.6), None), ({"neutral_loss": None}, 7.34), ({}, 7.34)]
)
def test_nothing_is_said_where_it_can_or_nothing_is_known(before, uniform):
    assert unknown_text(before, uniform) == []
