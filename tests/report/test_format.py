"""One form each for a rate, a loss and a difference."""

from __future__ import annotations

import math

import pytest

from moe_ray.report.format import (
    MISSING,
    decimal,
    difference,
    has_interval,
    is_measured,
    is_significant,
    loss,
    rate,
    setting,
    significant_digits,
)

NAN = math.nan


def figure(value, low=None, high=None, n=None):
    return {"value": value, "low": low, "high": high, "n": n}


@pytest.mark.parametrize(
    ("known", "shown"),
    [
        (figure(0.75, 0.505, 0.898, 16), "75.0% [50.5%, 89.8%]"),
        (figure(0, 0, 0.038), "0.0% [0.0%, 3.8%]"),
        (figure(1, 0.962, 1), "100.0% [96.2%, 100.0%]"),
        (figure(0.5), "50.0%"),
        (figure(0.5, NAN, NAN), "50.0%"),
        (0.0625, "6.2%"),
        (-1e-9, "0.0%"),
    ],
)
def test_a_rate_is_a_percentage(known, shown):
    assert str(rate(known)) == shown


@pytest.mark.parametrize(
    ("known", "shown"),
    [
        (figure(1.0834, 0.96, 1.24), "1.083 nats/token [0.960, 1.240]"),
        (figure(0.0, -0.0, 0.0), "0.000 nats/token [0.000, 0.000]"),
        (figure(2.0, None, None, 1), "2.000 nats/token"),
        (10, "10.000 nats/token"),
    ],
)
def test_a_loss_is_in_nats_per_token(known, shown):
    assert str(loss(known)) == shown


@pytest.mark.parametrize(
    ("known", "unit", "shown"),
    [
        (figure(0.75, 0.438, 0.898), "points", "+75.0 points [+43.8, +89.8]"),
        (figure(-0.25, -0.402, -0.111), "points", "-25.0 points [-40.2, -11.1]"),
        (figure(0.0, -0.038, 0.038), "points", "0.0 points [-3.8, +3.8]"),
        (figure(-0.0001, -0.1, 0.0), "points", "0.0 points [-10.0, 0.0]"),
        (figure(1, 0.9, 1), "points", "+100.0 points [+90.0, +100.0]"),
        (figure(-0.565, -0.787, -0.41), "nats/token", "-0.565 nats/token [-0.787, -0.410]"),
        (figure(0.0004, -0.0004, 0.001), "nats/token", "0.000 nats/token [0.000, +0.001]"),
        (0.25, "points", "+25.0 points"),
        (0.25, "nats/token", "+0.250 nats/token"),
    ],
)
def test_a_difference_has_a_sign_and_a_unit_and_zero_has_no_sign(known, unit, shown):
    assert str(difference(known, unit)) == shown


@pytest.mark.parametrize("missing", [None, NAN, {}, figure(None, n=0), figure(NAN, NAN, NAN, 0)])
def test_what_was_not_measured_is_a_dash_without_unit_or_interval(missing):
    for shown in (rate(missing), loss(missing), difference(missing, "points"), difference(missing, "nats/token")):
        assert str(shown) == MISSING
    assert not is_measured(missing)
    assert not has_interval(missing)
    assert not is_significant(missing)


@pytest.mark.parametrize(
    ("n", "shown"), [(16, " (n = 16)"), (16.0, " (n = 16)"), (0, " (n = 0)"), (None, ""), (NAN, "")]
)
def test_the_number_of_examples_is_told_where_it_is_known(n, shown):
    assert rate(figure(0.5, n=n)).with_n() == f"50.0%{shown}"


def test_a_table_whose_head_names_the_unit_leaves_it_out():
    assert str(difference(figure(0.5, 0.25, 0.75), "points").without_unit()) == "+50.0 [+25.0, +75.0]"
    assert str(loss(figure(0.5, 0.25, 0.75, 3)).without_unit()) == "0.500 [0.250, 0.750]"


@pytest.mark.parametrize(
    ("low", "high", "is_apart"),
    [
        (0.1, 0.2, True),
        (-0.2, -0.1, True),
        (-0.1, 0.1, False),
        (0.0, 0.1, False),
        (-0.1, 0.0, False),
        (NAN, 0.1, False),
    ],
)
def test_a_difference_is_significant_where_its_interval_excludes_zero(low, high, is_apart):
    assert is_significant(figure(0.1, low, high)) is is_apart


def test_no_number_of_any_kind_is_a_negative_zero():
    assert [decimal(-0.0), decimal(-0.0004, signed=True), decimal(-1e-12, 1), significant_digits(0.0)] == [
        "0.000", "0.000", "0.0", "0",
    ]  # fmt: skip


def test_plain_numbers_and_settings():
    assert [significant_digits(value) for value in (0.000389, 12.3456, None, NAN)] == ["0.000389", "12.3", "–", "–"]
    assert [setting(value) for value in (0.123456, 12, "masked", True, ("a", "b"))] == [
        "0.1235", "12", "masked", "True", "('a', 'b')",
    ]  # fmt: skip
