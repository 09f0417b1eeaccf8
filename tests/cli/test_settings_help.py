"""The help lists every setting under its section, as it would be typed."""

import re

import pytest

from moe_ray.cli.settings_help import as_value, settings_help
from moe_ray.config.io import describe_keys, load_config


def test_every_setting_is_listed_under_its_section():
    section, listed = "", []
    for line in settings_help().splitlines():
        if heading := re.fullmatch(r"(\w+): \S.*", line):
            section = heading[1]
        elif setting := re.match(r"  ([\w.]+)=.*  \(.+\)$", line):
            listed.append(setting[1])
            assert setting[1].rpartition(".")[0] == section
    assert listed == [key for key, *_ in describe_keys()]


def test_the_settings_of_some_sections_are_theirs_and_the_run_directory():
    listed = re.findall(r"^  ([\w.]+)=", settings_help(["report"]), re.MULTILINE)
    assert listed == ["run_dir", "report.batches", "report.examples"]


def test_what_is_listed_may_be_typed_and_is_the_default():
    typed = [f"{key}={as_value(default)}" for key, _, default, _ in describe_keys()]
    assert load_config(overrides=typed) == load_config()
    assert all("\n" not in word for word in typed)


@pytest.mark.parametrize(
    ("value", "text"), [("", "''"), (True, "true"), (("a", "b"), "[a, b]"), (0.5, "0.5"), ({"a": [1]}, "{a: [1]}")]
)
def test_a_value_is_one_line_of_yaml(value, text):
    assert as_value(value) == text


def test_no_line_is_wider_than_the_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "72")
    texts = [line for line in settings_help().splitlines() if line.startswith(" " * 6)]
    assert len(texts) > 100
    assert max(map(len, texts)) <= 72
