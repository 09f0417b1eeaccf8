"""YAML that is damaged, foreign or made to do harm ends in a sentence, before anything is done."""

from __future__ import annotations

import time

import pytest
from damage import damaged, refusal_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_ray.config.io import flatten, load_config, parse_config, to_yaml
from moe_ray.config.run import Config
from moe_ray.config.yaml_text import parse_yaml
from moe_ray.errors import InputError

WHOLE = to_yaml(Config()).encode()
ODD = (
    *("-1", "1e999", ".inf", "-.inf", ".nan", "null", "true", "[]", "{}", "[[[]]]", "{a: {b: 1}}", "''", "'\\0'"),
    *('"\\ud800"', "9" * 5000, "0x" + "f" * 5000, "2020-13-45", "!!binary abc", "!!python/object:os.system x", "*a"),
    *(
        "&a [*a]",
        "-0.0",
        "9" * 20,
        "~",
        "12:30:45",
        "<<: {a: 1}",
        "? [1]\n: 2",
        "- ",
        "a: b: c",
        "%",
        "@x",
        "`",
        "\x07",
    ),
)
many = settings(max_examples=400, suppress_health_check=list(HealthCheck), database=None)


@pytest.mark.slow
@many
@given(st.data())
def test_a_damaged_file_is_a_configuration_or_a_sentence(data):
    try:
        text = data.draw(damaged(WHOLE)).decode()
    except UnicodeDecodeError:
        return
    said = refusal_of(lambda: parse_config(text, source="run.yaml"))
    assert said is None or len(said) < 50_000


@pytest.mark.slow
@many
@given(st.sampled_from(sorted(flatten(Config()))), st.sampled_from(ODD))
def test_any_setting_takes_or_refuses_any_value(key, value):
    said = refusal_of(lambda: load_config(None, [f"{key}={value}"]))
    assert said is None or len(said) < 1_000


def test_aliases_of_aliases_are_counted_before_they_are_written_out():
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9)]
    started = time.perf_counter()
    with pytest.raises(InputError, match=r"more than 100,000 values; write its aliases") as error:
        parse_config("\n".join([*lines, "seed: *a8"]), source="run.yaml")
    assert len(str(error.value)) < 200
    assert time.perf_counter() - started < 5


def test_an_alias_as_people_use_it_is_taken():
    value, _ = parse_yaml("a: &list [1, 2]\nb: *list", "x")
    assert value == {"a": [1, 2], "b": [1, 2]}


@pytest.mark.parametrize("text", ["a: &a [*a]", "&a {b: *a}"])
def test_what_holds_itself_is_refused(text):
    with pytest.raises(InputError, match="values"):
        parse_yaml(text, "x")


@pytest.mark.slow
@pytest.mark.parametrize("text", ["[" * 100_000, "{a: " * 5_000])
def test_deep_nesting_is_a_sentence(text):
    with pytest.raises(InputError, match="nested too deeply"):
        parse_yaml(text, "x")


@pytest.mark.parametrize("value", ["9223372036854775808", "-9223372036854775808", "9" * 400])
def test_whole_numbers_have_64_bits(value):
    with pytest.raises(InputError, match="a whole number of 64 bits"):
        load_config(None, [f"seed={value}"])


def test_a_long_value_is_shown_in_short():
    with pytest.raises(InputError) as error:
        load_config(None, [f"finetune.epochs={'x' * 10_000}"])
    assert len(str(error.value)) < 600
