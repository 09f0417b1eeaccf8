"""The benchmark of answering compares ways that give the same answers."""

from __future__ import annotations

import runpy
import sys

import pytest
from paths import ROOT

SCRIPT = ROOT / "benchmarks" / "generation.py"


@pytest.mark.slow
def test_every_way_gives_the_answers_of_the_way_before_and_masks_per_row_cost_less(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--turns", "1", "--budgets", "8192", "--new-tokens", "8"])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    lines = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    rows = {row[0]: dict(zip(lines[0], row, strict=True)) for row in lines[2:]}
    answered = {name: row for name, row in rows.items() if "losses" not in name}
    assert len(answered) == 5
    assert len(rows) == 7
    assert {row["equal"] for row in answered.values()} == {"96 of 96"}
    assert float(rows["masked, 8192 tokens, a mask per row"]["faster"].rstrip("x")) > 2
    assert float(rows["masked losses, 8192 tokens, a mask per row"]["equal"].split()[0]) < 1e-3
    assert all(0 <= float(row["padding"].rstrip("%")) < 50 for row in rows.values())
