"""What a figure shows is what its numbers say."""

from __future__ import annotations

import base64
import io
import re

import numpy as np
import pandas as pd
from matplotlib.image import imread
from svg_texts import texts

from moe_ray.report.before_after import BeforeAfter
from moe_ray.report.html import figures


def test_the_brightest_cells_of_a_heat_map_are_the_largest_differences():
    grid_LE = np.linspace(-0.1, 0.1, 64).reshape(4, 16)
    grid_LE[1, 3], grid_LE[2, 2] = 0.7, 0.6
    svg = figures.heat_map("risk", "Risk", grid_LE, grid_LE > 0.5, range(4), limit=0.7)
    image, _scale = re.findall(r'href="data:image/png;base64,([^"]+)"', svg)
    grey_YX = imread(io.BytesIO(base64.b64decode(image)))[:, :, :3] @ [0.2126, 0.7152, 0.0722]
    height, width = grey_YX.shape[0] // 4, grey_YX.shape[1] // 16
    cells_LE = grey_YX[height // 2 :: height, width // 2 :: width]
    assert cells_LE.shape == (4, 16)
    assert {divmod(int(index), 16) for index in np.argsort(cells_LE.ravel())[-2:]} == {(1, 3), (2, 2)}


def test_a_small_heat_map_has_no_scale_and_few_ticks():
    svg = figures.heat_map("risk", "Risk", np.zeros((2, 40)), np.zeros((2, 40), bool), (1, 3), limit=1, is_small=True)
    assert len(re.findall(r'href="data:image/png', svg)) == 1
    assert texts(svg) == [*map(str, range(0, 40, 4)), "expert", "1", "3", "layer"]


def test_many_layers_of_a_small_map_are_numbered_as_far_apart_as_their_numbers_are_high():
    grid_LE = np.zeros((48, 128))
    svg = figures.heat_map("risk", "Risk", grid_LE, grid_LE > 1, range(48), limit=1, is_small=True)
    shown = texts(svg)
    assert shown[: shown.index("expert")] == [str(expert) for expert in range(0, 128, 16)]
    layers = shown[shown.index("expert") + 1 : shown.index("layer")]
    assert layers == [str(layer) for layer in range(0, 48, int(layers[1]))]
    height = float(re.search(r'viewBox="0 0 [\d.]+ ([\d.]+)"', svg)[1])
    assert height / len(layers) > 12
    assert figures.wide_maps(128)
    assert not figures.wide_maps(64)


def test_the_overlap_of_few_batches_is_numbered():
    table = pd.DataFrame({"batch_a": [4], "batch_b": [7], "jaccard": [0.25]})
    shown = texts(figures.overlap("overlap", "Overlap", table, [7, 4]))
    assert shown.count("0.25") == 2
    assert shown.count("1.00") == 2
    assert shown[:2] == ["7", "4"]


def test_bars_name_what_they_show_and_how_many_examples_there_are():
    known = {"value": 0.5, "low": 0.25, "high": 0.75, "n": 8}
    rows = [
        BeforeAfter(name="fraud", is_rate=True, before=known, after=known, change=None),
        BeforeAfter(name="theft", is_rate=True, before=known, after=None, change=None),
        BeforeAfter(name="nothing", is_rate=True, before=None, after=None, change=None),
    ]
    shown = texts(figures.before_after("bars", "Bars", rows, what="refused"))
    assert {"fraud (n = 8)", "theft (n = 8)", "before", "after", "refused", "100%"} <= set(shown)
    assert not [text for text in shown if "nothing" in text]


def test_the_union_has_a_line_for_each_top_k_and_one_for_the_run():
    table = pd.DataFrame({"top_k": [5, 5, 10, 10], "threshold": [0.0, 0.1] * 2, "union": [5, 2, 9, 2]})
    assert {"top_k 5", "top_k 10", "this run"} <= set(
        texts(figures.union_growth("union", "Union", table, "identify.threshold", 0.05))
    )


def test_training_without_validation_has_no_such_line():
    history = pd.DataFrame({"step": range(4), "epoch": [0, 0, 1, 1], "loss": 1.0, "grad_norm": 0.5})
    without, watched = (history.assign(validation_loss=value) for value in (None, 1.5))
    assert "validation" not in texts(figures.training_curves("training", "Training", without))
    assert "validation" in texts(figures.training_curves("training", "Training", watched))


def test_categories_show_the_experts_of_most_of_them():
    rows = [("fraud", "L00_E01", 1.0), ("theft", "L00_E01", 0.5), ("theft", "L00_E02", 0.25)]
    by_category = pd.DataFrame(rows, columns=["category", "name", "share"])
    assert {"fraud", "theft", "L00_E01", "L00_E02"} <= set(
        texts(figures.experts_by_category("categories", "Categories", by_category))
    )
