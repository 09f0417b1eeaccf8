"""`moe-ray prompts` says which benchmark each file is of, and what a run would make of them."""

from __future__ import annotations

import pytest
from benchmark_files import write_benchmarks

from moe_ray.cli.checks import prompt_settings
from moe_ray.cli.main import main


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_benchmarks(tmp_path_factory.mktemp("benchmarks"))


def test_every_benchmark_is_named_with_its_counts(files, capsys):
    every = [str(path) for paths in files.values() for path in paths]
    assert main(["prompts", *every, "prompts.safe_per_batch=1", "prompts.unsafe_per_batch=1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    expected = [f"{path}: {name}: " for name, paths in files.items() for path in paths]
    assert [line.startswith(said) for line, said in zip(lines, expected, strict=False)] == [True] * len(every)
    assert lines[-1].split(";")[0].endswith("left over")
    assert "batches of 1 safe and 1 unsafe" in lines[-1]


def test_files_of_one_label_are_shown_though_a_run_would_refuse_them(files, capsys):
    assert main(["prompts", str(files["AdvBench"][0])]) == 0
    shown = capsys.readouterr().out
    assert "AdvBench: 2 rows, 0 safe, 2 unsafe" in shown
    assert "a run on these alone would be refused: prompts: got 0 safe and 2 unsafe examples" in shown


def test_a_prompt_cannot_steer_the_terminal(tmp_path, capsys):
    path = tmp_path / "p.csv"
    path.write_text("prompt,label,category\na,safe,\x1b[31mred\nb,unsafe,x\n")
    assert main(["prompts", str(path)]) == 0
    assert "\x1b" not in capsys.readouterr().out


def test_words_are_files_or_settings():
    settings = prompt_settings(["a.csv", "https://h/p.jsonl?download=true", "prompts.labels={1: unsafe}"])
    assert settings.prompts.files == ("a.csv", "https://h/p.jsonl?download=true")
    assert settings.prompts.labels == {1: "unsafe"}
    assert prompt_settings([]).prompts.files == ("embedded",)


def test_the_prompts_that_ship_are_shown_where_no_file_is_named(capsys):
    assert main(["prompts"]) == 0
    assert "batches of 8 safe and 8 unsafe examples" in capsys.readouterr().out
