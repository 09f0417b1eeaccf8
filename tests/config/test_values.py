import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_ray.config.fields import Setting
from moe_ray.config.values import WrongSettings, fit, plain_value

ANY = Setting(text="any", affects=("speed",))


@pytest.mark.parametrize(
    ("given", "hint", "kept"),
    [
        (np.int64(3), int, 3),
        (np.float32(0.5), float, 0.5),
        (3, float, 3.0),
        ("5e-4", float, 5e-4),
        ("a", tuple[str, ...], ("a",)),
        (["a", "b"], tuple[str, ...], ("a", "b")),
    ],
)
def test_what_means_the_same_becomes_the_type_of_the_setting(given, hint, kept):
    value = fit(given, hint, ANY, "key")
    assert value == kept
    assert type(value) is type(kept)


@pytest.mark.parametrize(
    ("given", "hint"),
    [(True, int), (True, float), (1, bool), (1.0, int), ("1", int),
     ("x", float), (None, str), (float("inf"), float), ("nan", float)],
)  # fmt: skip
def test_nothing_else_is_guessed(given, hint):
    with pytest.raises(WrongSettings, match="key: got"):
        fit(given, hint, ANY, "key")


@given(st.floats(allow_nan=False, allow_infinity=False), st.floats(-10, 10))
def test_a_value_is_taken_exactly_when_it_is_within_its_bound(value, bound):
    setting = Setting(text="any", affects=("speed",), at_least=bound)
    try:
        assert fit(value, float, setting, "key") == value
        assert value >= bound
    except WrongSettings:
        assert value < bound


def test_a_plain_value_has_no_tuple_at_any_depth():
    assert plain_value({"a": ("b", {"c": (1,)})}) == {"a": ["b", {"c": [1]}]}
