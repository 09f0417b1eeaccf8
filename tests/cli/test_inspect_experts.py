"""The inspection script answers every question of a run directory, and refuses others clearly."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from ablation_run import write_ablation
from prompt_tokens import by_prompt_tokens
from run_directory import write_controlled, write_found, write_identified

from moe_ray.cli.arguments import QUESTIONS
from moe_ray.cli.inspect_experts import ANSWERS
from moe_ray.cli.main import main
from moe_ray.config.io import to_yaml
from moe_ray.config.run import Config
from moe_ray.experts import Expert
from moe_ray.identification.identify import identify
from moe_ray.routing.count_tables import counts_to_table
from moe_ray.storage.folder import Folder
from moe_ray.testing.simulated_counts import Population, simulate


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    config = replace(Config(), identify=by_prompt_tokens())
    folder = Folder.open(str(tmp_path_factory.mktemp("run")))
    counts = simulate(Population(), num_batches=4, planted=(Expert(1, 3), Expert(2, 2)), shift=0.7)
    rows = [
        {
            "batch_idx": int(batch),
            "in_batch_idx": int(position),
            "id": f"{batch}-{position}",
            "label": label,
            "category": ["fraud", "wea\x1bpons"][batch % 2],
            "messages": json.dumps([{"role": "user", "content": f"text {batch} {position}"}]),
            "pair": None,
        }
        for batch, position, label in zip(counts.batch_idx, counts.in_batch_idx, counts.label, strict=True)
    ]
    risk = identify(counts, config.identify)
    folder.write_bytes("config.yaml", to_yaml(config).encode())
    folder.sub("prompts").write_table("batches.parquet", pd.DataFrame(rows))
    folder.sub("capture").sub("counts").write_table("part-0.parquet", counts_to_table(counts))
    write_found(folder.sub("identify"), risk, config.identify)
    return folder.path


@pytest.mark.slow
def test_every_question_is_answered(run_dir: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", run_dir, "--export", str(tmp_path / "out.pkl")]) == 0
    out = capsys.readouterr().out
    assert "4 of 4 batches have at least one selected expert with corrected p" in out
    assert "L01_E03" in out
    assert "fraud, wea\N{REPLACEMENT CHARACTER}pons" in out
    assert "6 pairs of batches: mean Jaccard" in out
    assert "esft_token" in out
    assert "\x1b" not in out
    assert len(pd.read_pickle(tmp_path / "out.pkl")["batch_expert_masks"]) == 4


def test_a_file_that_exists_is_not_overwritten(
    run_dir: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "mine.pkl"
    mine.write_text("mine")
    assert main(["inspect", run_dir, "--export", str(mine)]) == 2
    assert mine.read_text() == "mine"
    captured = capsys.readouterr()
    assert "exists; name another file" in captured.err
    assert captured.out == ""


def test_an_unknown_category_names_the_known_ones(run_dir: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", run_dir, "--ask", "categories", "--category", "spam"]) == 2
    assert "got 'spam', expected one of fraud" in capsys.readouterr().err


def test_every_question_of_the_help_has_an_answer() -> None:
    assert list(ANSWERS) == list(QUESTIONS)


def test_a_folder_without_a_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path)]) == 2
    assert "is not a run directory" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there_is_refused_and_not_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path / "nowhere")]) == 2
    assert "is not a run directory" in capsys.readouterr().err
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.slow
def test_the_cause_is_told_after_the_check_and_before_it_how_to_check(tmp_path, capsys):
    folder = Folder.open(str(tmp_path / "run"))
    write_identified(folder)
    assert main(["inspect", folder.path, "--ask", "cause"]) == 0
    assert "moe-ray ablate checks it" in capsys.readouterr().out
    write_ablation(folder)
    assert main(["inspect", folder.path, "--ask", "cause", "categories"]) == 0
    out = capsys.readouterr().out
    assert ": causal; better than" in out
    assert "Batch 3 (theft)" in out
    assert "lost without it" in out


def test_without_topics_and_templates_it_says_that_they_cannot_be_controlled_for(
    run_dir: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", run_dir, "--ask", "confounds"]) == 0
    assert "no prompt says its topic or template" in capsys.readouterr().out


def test_controls_are_shown_in_words_and_expert_by_expert(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Folder.open(str(tmp_path))
    write_identified(folder)
    write_controlled(folder)
    assert main(["inspect", str(tmp_path), "--ask", "confounds"]) == 0
    out = capsys.readouterr().out
    assert "Of 6 selected experts in 3 batches 4 survive the control for topic" in out
    assert "within topic: harm =" in out
    assert out.count("L01_E03") == 3
