"""Figures of one page do not get in each other's way."""

from __future__ import annotations

import re

import pytest

from moe_ray.report.before_after import RATES
from moe_ray.report.html.svg import draw, label


def plot(figure):
    axes = figure.add_subplot()
    axes.plot([0, 1], [0, 1], label="</text><script>")
    axes.imshow([[0, 1]])
    axes.set_title("$theft_{")
    axes.legend()


def test_ids_and_what_refers_to_them_carry_the_figure_s_name():
    svg = draw("one", "What <it> shows", plot)
    ids = re.findall(r'\bid="(.*?)"', svg)
    assert ids
    assert all(name.startswith("one-") for name in ids)
    references = re.findall(r"url\(#(.*?)\)", svg) + re.findall(r'href="#(.*?)"', svg)
    assert references
    assert set(references) <= set(ids)


def test_texts_stay_texts_and_are_escaped():
    svg = draw("one", "What <it> shows", plot)
    assert "<title>What &lt;it&gt; shows</title>" in svg
    assert "&lt;/text&gt;&lt;script&gt;" in svg
    assert "$theft_{" in svg
    assert "<script>" not in svg


@pytest.mark.slow
def test_the_same_figure_is_the_same_text_and_begins_with_its_element():
    assert draw("one", "t", plot) == draw("one", "t", plot)
    assert draw("one", "t", plot).startswith("<svg")


def test_labels_are_short_and_never_empty():
    assert label("") == "uncategorised"
    assert label("a\x1b") == "a\ufffd"
    assert label("x" * 30) == "x" * 23 + "…"


def test_a_label_on_two_lines_is_cut_on_the_second():
    assert label("safe prompts refused or degenerate", lines=2) == "safe prompts refused or\ndegenerate"
    assert label("x" * 60, lines=2) == "x" * 24 + "\n" + "x" * 23 + "…"
    assert label("short", lines=2) == "short"


def test_the_names_that_are_ours_are_whole():
    assert not [name for name in RATES.values() if "…" in label(name, lines=2)]
