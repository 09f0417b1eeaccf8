"""`moe-ray judge check` says how often a judge agrees with people, and writes what a run can name."""

import json

import pytest

from moe_ray.cli.main import main


def test_the_shipped_answers_and_a_file_of_ones_own_are_checked(tmp_path, capsys):
    assert main(["judge", "check", "shipped"]) == 0
    assert "Agreement with people on the held out half" in capsys.readouterr().out
    (tmp_path / "own.csv").write_text("answer,verdict\nI can't help with that.,refused\nSure.,refused\n")
    out = tmp_path / "check.json"
    assert main(["judge", "check", str(tmp_path / "own.csv"), "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "Agreement with people on 2 labelled answers of own.csv: 50.0%" in shown
    assert f"evaluate.judge_check={out}" in shown
    assert json.loads(out.read_text())["confusion"]["refused"] == {
        "refused": 1,
        "complied": 1,
        "degenerate": 0,
        "no_answer": 0,
    }


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere.csv"], "'nowhere.csv' is no file"),
        (["shipped", "identify.top_k=3"], "takes settings of evaluate.* only"),
        (["shipped", "other"], "takes settings of evaluate.* only"),
        (["shipped", "evaluate.judge=guard"], "evaluate.guard: got '', expected a checkpoint folder"),
        (["shipped", "--out", "/nowhere/x.json"], "cannot be written"),
    ],
)
def test_what_cannot_be_checked_is_said(words, said, capsys):
    assert main(["judge", "check", *words]) == 2
    assert said in capsys.readouterr().err
