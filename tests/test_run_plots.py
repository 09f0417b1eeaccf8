"""The figures of a run show its numbers, on the axes that they are given."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from ablation_run import write_ablation
from matplotlib.figure import Figure
from run_directory import PLANTED, write_identified, write_repaired

from moe_ray.errors import InputError
from moe_ray.run_directory import RunDirectory, open_run
from moe_ray.storage.folder import Folder

PLOTS = ("plot_risk_differences", "plot_masks", "plot_rates", "plot_training_loss", "plot_causal_lift")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = Folder.open(str(tmp_path_factory.mktemp("run")))
    write_identified(folder)
    write_ablation(folder)
    write_repaired(folder)
    return open_run(folder.url)


@pytest.fixture
def ax():
    return Figure().add_subplot()


@pytest.mark.slow
@pytest.mark.parametrize("name", PLOTS)
def test_each_draws_on_the_axes_given_and_returns_them(run, ax, name):
    assert getattr(run, name)(ax=ax) is ax
    assert ax.get_xlabel()
    assert ax.has_data()


@pytest.mark.parametrize("batch_idx", [None, 2])
def test_the_map_has_the_risk_differences_and_marks_the_unsafe_experts(run, ax, batch_idx):
    run.plot_risk_differences(batch_idx, ax=ax)
    grid_LE = ax.images[0].get_array()
    assert {divmod(int(index), 16) for index in np.argsort(np.asarray(grid_LE).ravel())[-2:]} == {*map(tuple, PLANTED)}
    marked = {(int(row), int(column)) for column, row in ax.lines[0].get_xydata()}
    expected_LE = run.masks.union if batch_idx is None else run.masks[batch_idx]
    assert marked == {*map(tuple, np.argwhere(expected_LE).tolist())}


def test_masks_are_counted_over_batches(run, ax):
    run.plot_masks(ax=ax)
    assert np.array_equal(ax.images[0].get_array(), run.masks.masks_BLE.sum(axis=0))


def test_rates_are_bars_before_and_after(run, ax):
    run.plot_rates(ax=ax)
    widths = [patch.get_width() for patch in ax.patches]
    assert widths == [0.0, 0.0, 0.75, 0.0]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["unsafe refused", "safe refused"]


def test_the_lift_over_each_control_is_a_point(run, ax):
    run.plot_causal_lift(ax=ax)
    rows = {row["set"]: row["lift"] for row in run.ablation["table"] if np.isfinite(row.get("lift") or np.nan)}
    assert [label.get_text() for label in ax.get_yticklabels()] == list(rows)
    assert ax.lines[0].get_xdata().tolist() == list(rows.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plot_rates", "plot_training_loss", "plot_causal_lift"])
def test_what_a_run_has_not_done_names_what_to_run(tmp_path, ax, name):
    write_identified(Folder.open(str(tmp_path)))
    with pytest.raises(InputError, match=r"moe-ray (full|finetune|ablate)"):
        getattr(RunDirectory.open(str(tmp_path)), name)(ax=ax)


def test_an_unknown_batch_is_refused(run, ax):
    with pytest.raises(InputError, match=r"got 99, expected one of \[0, 1, 2, 3\]"):
        run.plot_risk_differences(99, ax=ax)


def test_without_matplotlib_the_extra_is_named(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)
    with pytest.raises(InputError, match=r"moe-ray\[plots\]"):
        run.plot_masks()
