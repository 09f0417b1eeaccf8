"""The capture benchmark runs and compares like with like."""

from __future__ import annotations

import re
import runpy
import sys

import pytest
from paths import ROOT

SCRIPT = ROOT / "benchmarks" / "capture_overhead.py"


@pytest.mark.slow
def test_the_benchmark_prints_the_ratios_of_both_families(monkeypatch, capsys):
    options = {"--shape": ["tiny"], "--turns": ["3"], "--tokens": ["32"], "--lengths": ["8", "16"]}
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *(word for name in options for word in (name, *options[name]))])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert [row.split(" | ")[2] for row in rows[2:]] == ["4 x 8", "2 x 16"] * 2
    for row in rows[2:]:
        ratios = [float(ratio) for ratio in re.findall(r"([\d.]+) \(", row)]
        assert len(ratios) == len(rows[0].split("|")) - 7
        assert all(0.1 < ratio < 10 for ratio in ratios)
        assert 0 < float(re.findall(r"([\d.]+)% \|$", row)[0]) < 100
