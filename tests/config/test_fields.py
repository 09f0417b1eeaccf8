import math

import pytest

from moe_ray.config.fields import setting
from moe_ray.config.keys import keys_of


@pytest.mark.parametrize(
    ("bounds", "words"),
    [
        ({}, ""),
        ({"at_least": 1}, "1 or more"),
        ({"above": 0}, "above 0"),
        ({"at_most": 3}, "at most 3"),
        ({"below": 2}, "below 2"),
        ({"at_least": 0, "at_most": 1}, "0 to 1"),
        ({"at_least": -1, "below": 1}, "-1 to below 1"),
        ({"above": 0, "at_most": 1}, "above 0 and at most 1"),
        ({"above": 0, "below": 1}, "above 0 and below 1"),
    ],
)
def test_bounds_are_said_in_words(bounds, words):
    field = setting(1, "text", affects="speed", **bounds)
    assert field.metadata["setting"].bounds == words


def test_nan_is_within_no_bounds():
    field = setting(1.0, "text", affects="speed", at_least=0)
    assert not field.metadata["setting"].allows(math.nan)


def test_every_default_is_within_its_own_bounds():
    for key in keys_of():
        if isinstance(key.default, (int, float)):
            assert key.setting.allows(key.default), key.name
