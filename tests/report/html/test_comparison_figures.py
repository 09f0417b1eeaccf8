"""What the figures of a comparison show is what its numbers say."""

import re

import pandas as pd
import pytest
from svg_texts import texts

from moe_ray.report.html import comparison_figures


def table(*arms):
    rows = [
        {
            "arm": arm,
            "share": share,
            "steps": 0 if arm in ("base", "mask_only") else int(8 * share),
            "unsafe_refusal_rate": rate,
        }
        for arm, rates in arms
        for share, rate in zip((0.25, 0.5, 1.0), rates, strict=True)
    ]
    return pd.DataFrame(rows)


ARMS = (
    ("base", (0.1,) * 3),
    ("per_batch", (0.5, 0.9, 1.0)),
    ("mask_only", (0.7,) * 3),
    ("policy:natural", (0.4, 0.8, 1.0)),
)


def test_every_arm_but_the_base_has_a_line_and_a_name():
    drawn = texts(comparison_figures.curves("baselines", "Refused", table(*ARMS)))
    assert {"per_batch", "mask_only", "policy:natural"} <= set(drawn)
    assert "base" not in drawn
    assert {"share of the steps", "unsafe prompts refused", "100%"} <= set(drawn)


def heights(svg):
    """Per line with four points, in the order of drawing, their heights in the picture, from above; ours is on top."""
    paths = re.findall(r'<path d="(M [^"]*)" clip-path', svg)
    points = [re.findall(r"[ML] ([\d.]+) ([\d.]+)", path) for path in paths]
    return [[float(y) for _, y in of_line] for of_line in points if len(of_line) == 4]


def test_lines_begin_at_the_base_and_what_trains_nothing_is_level():
    around, natural, ours = heights(comparison_figures.curves("baselines", "Refused", table(*ARMS)))
    assert ours[0] == natural[0] > ours[1] > ours[2] > ours[3]
    assert len(set(around)) == 1
    assert natural[1] > ours[1]  # refused less often, so lower down


def test_a_transfer_matrix_has_every_value_and_a_frame_for_each_category_with_itself():
    matrix = pd.DataFrame([[1.0, 0.25], [0.125, float("nan")]], index=["fraud", "theft"], columns=["fraud", "theft"])
    svg = comparison_figures.transfer("transfer", "Transfer", matrix)
    assert {"1.000", "0.250", "0.125", "–", "trained", "tested", "fraud", "theft"} <= set(texts(svg))
    assert len(re.findall(r"stroke-width: 1\.5", svg)) == 2


@pytest.mark.parametrize("name", ["<script>alert(1)</script>", "$x_{"])
def test_hostile_names_are_text(name):
    matrix = pd.DataFrame([[1.0, 0.5]], index=[name], columns=[name, "theft"])
    svg = comparison_figures.transfer("transfer", "Transfer", matrix)
    assert "<script>" not in svg
