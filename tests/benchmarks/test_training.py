"""The training benchmark runs and compares like with like."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from paths import ROOT

SCRIPT = ROOT / "benchmarks" / "training.py"


@pytest.mark.slow
@pytest.mark.exhaustive
def test_the_benchmark_prints_a_row_per_method_and_ours_holds_no_more_than_the_unions_share():
    command = [sys.executable, str(SCRIPT), "--shape", "tiny", "--steps", "4", "--threads", "1", "--turns", "1"]
    command += ["--methods", "full", "ours"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = [line for line in done.stdout.splitlines() if line.startswith("|")][2:]
    assert len(rows) == 2
    share = float(re.findall(r"\| ([\d.]+) \|$", rows[-1])[0])
    assert share <= 1.05
