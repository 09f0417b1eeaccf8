"""The script that holds the real vLLM against transformers, run with the fake one, which is transformers."""

from __future__ import annotations

import re
import runpy
import sys

import fake_vllm
import pytest
from paths import ROOT

from moe_ray.errors import InputError

SCRIPT = ROOT / "benchmarks" / "vllm_parity.py"


def run(monkeypatch, capsys, path, fault=""):
    monkeypatch.setitem(sys.modules, "vllm", fake_vllm.module(fault))
    arguments = [str(SCRIPT), str(path), "--number", "4", "--new-tokens", "4", "--dtype", "float32", "--gpus", "0"]
    monkeypatch.setattr(sys, "argv", arguments)
    runpy.run_path(str(SCRIPT), run_name="__main__")
    return capsys.readouterr().out


@pytest.mark.slow
def test_the_same_engine_agrees_in_everything_and_one_that_moves_rows_does_not(
    monkeypatch, capsys, untrained_model_path
):
    said = run(monkeypatch, capsys, untrained_model_path)
    assert "the same set of experts: 100.0000%" in said
    assert re.search(r"counted for another expert: 0 of [1-9]", said)
    assert "greedy answers equal: 4 of 4" in said
    speeds = [line.split("|")[2:4] for line in said.splitlines() if line.startswith(("| transformers", "| vLLM"))]
    assert len(speeds) == 2
    assert all(float(cell.replace(",", "")) > 0 for row in speeds for cell in row)
    moved = run(monkeypatch, capsys, untrained_model_path, "shifted_rows")
    equal, shifted = (
        float(re.search(f"{words}: ([0-9.]+)%", moved)[1]) for words in ("same set of experts", "moved by a token")
    )
    assert shifted > 90 > equal


@pytest.mark.slow
def test_a_wrong_form_ends_it(monkeypatch, capsys, untrained_model_path):
    with pytest.raises(InputError, match="may never have been filled"):
        run(monkeypatch, capsys, untrained_model_path, "zero_rows")
