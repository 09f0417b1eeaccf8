"""What the terminal shows in tables."""

from __future__ import annotations

import pandas as pd
import pytest

from moe_ray.report.terminal import (
    artifacts_of,
    next_commands,
    print_answer,
    print_frame,
    print_result,
    print_table,
    print_text,
)
from moe_ray.storage.folder import Folder


def figure(value, low, high, n=24):
    return {"value": value, "low": low, "high": high, "n": n}


def block(unsafe, safe, loss):
    figures = {"unsafe_refusal_rate": unsafe, "safe_refusal_rate": safe, "target_loss": loss}
    return {**figures, "masked": None, "neutral_loss": None, "routing_drift": None}


SUMMARY = {
    "before": block(figure(0.0, 0.0, 0.138), figure(0.25, 0.12, 0.449), figure(1.083, 0.96, 1.24, 48)),
    "after": block(figure(0.917, 0.742, 0.977), figure(0.375, 0.212, 0.573), figure(0.518, 0.456, 0.582, 48)),
    "change": block(figure(0.917, 0.694, 0.977), figure(0.125, -0.068, 0.307), figure(-0.565, -0.787, -0.41, 48)),
    "trainable_parameters": 1000,
    "total_parameters": 4000,
    "frozen_parameters_changed": 0,
    "pairs": None,
    "seconds": {"routing": 42.08, "answers": 3.5, "total": 704.46},
    "start_seconds": {"routing": 7.02, "total": 7.02},
}


def test_each_figure_has_its_interval_its_change_and_its_n(capsys):
    print_result(SUMMARY, [], {}, {})
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "unsafe prompts refused 0.0% [0.0%, 13.8%] 91.7% [74.2%, 97.7%] +91.7 points [+69.4, +97.7] 24" in lines
    assert "safe prompts refused 25.0% [12.0%, 44.9%] 37.5% [21.2%, 57.3%] +12.5 points [-6.8, +30.7] 24" in lines
    assert (
        "loss on target responses (nats/token) 1.083 [0.960, 1.240] 0.518 [0.456, 0.582] -0.565 [-0.787, -0.410] 48"
        in lines
    )


def test_it_says_where_things_are_and_what_was_reused(capsys):
    print_result(SUMMARY, ["routing"], {"report.html": "/runs/[bold]x\x1b[2J/report.html"}, {})
    out = capsys.readouterr().out
    assert "routing (reused)" in out
    lines = [line.split() for line in out.splitlines()]
    assert ["routing", "(reused)", "7.0", "35.1", "42.1"] in lines
    assert ["answers", "0.0", "3.5", "3.5"] in lines
    assert ["total", "7.0", "697.4", "704.5"] in lines
    assert "/runs/[bold]x" in out
    assert "\x1b" not in out


def test_numbers_are_flush_right_and_words_flush_left(capsys):
    rows = pd.DataFrame({"": ["a", "b"], "rate": ["5.0%", "100.0%"], "id": ["3fa2", "x"], "all": ["all", "1,000"]})
    print_table("T", rows, caption="[red]\x1b\nsecond")
    out = capsys.readouterr().out.splitlines()
    assert [line.rstrip() for line in out[1:] if "─" not in line] == [
        "== T ==",
        "      rate   id       all",
        "a     5.0%   3fa2     all",
        "b   100.0%   x      1,000",
        "[red]\ufffd",
        "second",
    ]


def test_cells_may_have_two_lines_and_markup_is_text(capsys):
    print_table("[bold]T", pd.DataFrame({"a\nb": ["1\n[2, 3]"], "c": ["[bold]x"]}))
    assert [line.split() for line in capsys.readouterr().out.splitlines() if line and "─" not in line] == [
        ["==", "[bold]T", "=="], ["a"], ["b", "c"], ["1", "[bold]x"], ["[2,", "3]"],
    ]  # fmt: skip


def test_a_person_is_shown_the_report_first(tmp_path):
    artifacts = artifacts_of(Folder.open(str(tmp_path)), "http://mlflow", "abc")
    assert next(iter(artifacts)) == "report.html"
    assert artifacts["report.html"].endswith(f"{tmp_path}/report.html")
    assert (artifacts["MLflow"], artifacts["MLflow run"]) == ("http://mlflow", "abc")


def figures_table():
    rate, change = "100.0% [92.6%, 100.0%]", "+100.0 points [+89.5, +100.0]"
    names = ["unsafe prompts refused", "loss on target responses (nats/token)"]
    return pd.DataFrame({"": names, "before": rate, "after": rate, "paired change": change, "n": "12,345"})


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_no_number_is_cut_however_wide_the_terminal_is(columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(columns))
    rows = figures_table()
    print_table("Figures", rows, caption="word " * 60)
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= columns
    words = out.split()
    for cell in rows.drop(columns=[""]).to_numpy().ravel():
        assert set(cell.split()) <= set(words), cell
    assert "…" not in out


def test_columns_without_room_beside_each_other_become_lines_of_each_row(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "60")
    wide = pd.DataFrame({"arm": ["mine"], **{f"figure {index}": [f"{index}12,345.678"] for index in range(9)}})
    print_table("Wide", wide)
    _, title, first, second, *_ = capsys.readouterr().out.splitlines()
    assert (title, first, second) == ("== Wide ==", "arm: mine", "  figure 0: 012,345.678")


def test_text_is_broken_between_words_and_keeps_what_is_aligned(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "40")
    print_text("T", "  a    b\n  " + "word " * 20 + "\n" + "x" * 50)
    lines = capsys.readouterr().out.splitlines()[2:]
    assert lines[0] == "  a    b"
    assert all(line.startswith("  word") and len(line) <= 40 for line in lines[1:-1])
    assert lines[-1] == "x" * 50


def test_a_long_place_is_neither_cut_nor_folded(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "40")
    place = "/" + "folder/" * 20 + "report.html"
    print_result(SUMMARY, [], {"report.html": place}, {"ask it": f"moe-ray chat {place}"})
    lines = capsys.readouterr().out.splitlines()
    assert f"report.html   {place}" in lines
    assert lines[lines.index("ask it") + 1] == f"  moe-ray chat {place}"


def test_what_a_person_types_next_names_the_runs_own_store_and_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = Folder.open(str(tmp_path / "my runs" / "first"))
    commands = next_commands(folder, f"sqlite:///{tmp_path}/my runs/mlflow.db", "1", "abc")
    assert commands == {
        "ask it, before and after": "moe-ray chat 'my runs/first'",
        "write the repaired model": "moe-ray merge 'my runs/first' 'my runs/first-repaired'",
        "see it in MLflow": "mlflow ui --backend-store-uri 'sqlite:///my runs/mlflow.db'",
    }
    commands = next_commands(Folder.open("memory://bucket/first"), "http://host:5000/", "1", "abc")
    assert commands["write the repaired model"] == "moe-ray merge memory:///bucket/first first-repaired"
    assert commands["see it in MLflow"] == "http://host:5000/#/experiments/1/runs/abc"


@pytest.mark.parametrize("width", [40, 80])
def test_no_interval_is_broken_where_there_is_room(capsys, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    rows = pd.DataFrame(
        {"": ["safe prompts refused or degenerate"], "rate": ["12.5% [1.0%, 24.0%]"], "n": ["0% → 8% (n = 48)"]}
    )
    print_table("Rates", rows)
    print_text("Said", "A sentence of some words, which says so: 12.5% [1.0%, 24.0%], that is of few (n = 48).")
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= width
    whole = "\n".join(lines)
    assert [whole.count(text) for text in ("[1.0%, 24.0%]", "(n = 48)")] == [2, 2]
    assert "\ue000" not in whole


def test_an_interval_is_broken_rather_than_the_table(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "21")
    print_table("Rates", pd.DataFrame({"x": ["1.0% [1.0%, 24.0%]"], "y": ["2.0% [1.0%, 24.0%]"]}))
    assert [line.split() for line in capsys.readouterr().out.splitlines()[-2:]] == [["[1.0%,"] * 2, ["24.0%]"] * 2]


def test_answers_are_broken_in_a_terminal_and_whole_where_they_are_redirected(monkeypatch, capsys):
    text = "one two three four five six seven eight nine ten eleven twelve"
    frame = pd.DataFrame({"name": ["a long name of an expert"], "first": [0.12345], "second": [2]})
    monkeypatch.delenv("COLUMNS", raising=False)
    print_answer(text)
    print_frame(frame)
    whole = capsys.readouterr().out.splitlines()
    assert whole[0] == text
    assert whole[1:] == frame.to_string(index=False, float_format="{:.3f}".format).splitlines()
    monkeypatch.setenv("COLUMNS", "30")
    print_answer(text)
    print_frame(frame)
    broken = capsys.readouterr().out
    assert max(map(len, broken.splitlines())) <= 30
    assert text.split() == broken.split()[: len(text.split())]
    assert {"0.123", "2"} < set(broken.split())


def test_a_table_of_nothing_is_said_to_be_one(capsys):
    print_frame(pd.DataFrame({"name": []}))
    assert capsys.readouterr().out == "(none)\n"
