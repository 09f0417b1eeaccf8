"""The causal check in words and rows, for a terminal and a page."""

from __future__ import annotations

import pytest
from ablation_run import write_ablation

from moe_ray.report.ablation_text import (
    ablation_rows,
    alone_of,
    batch_rows,
    category_rows,
    describe_ablation,
    set_name,
)
from moe_ray.report.format import MISSING
from moe_ray.storage.folder import Folder


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return write_ablation(Folder.open(str(tmp_path_factory.mktemp("run"))), num_batches=22)


@pytest.fixture(scope="module")
def notes(found):
    return found.as_dict()


@pytest.mark.slow
def test_every_kind_of_set_has_a_row_with_its_figures(notes):
    rows = ablation_rows(notes).set_index("without")
    assert rows.loc["the selected experts", "unsafe"].startswith("1.5")
    assert rows.loc["the selected experts", "selected − this"] == ""
    assert rows.loc["as many others", "selected − this"].startswith("+1.5")
    assert rows.loc["as many others", "p"]
    assert rows.loc["the strongest 1", "experts"] == "2.0"
    assert {"the busiest", "another category's", "one global list", "all but the selected"} <= set(rows.index)


@pytest.mark.slow
def test_batches_and_categories_have_their_verdicts(notes):
    assert {row["verdict"] for row in batch_rows(notes)} == {"causal"}
    assert batch_rows(notes)[0]["n"] == "8 + 8"
    assert [(row["category"], row["batches"], row["causal"]) for row in category_rows(notes)] == [
        ("fraud", "11", "11"), ("theft", "11", "11"),
    ]  # fmt: skip


@pytest.mark.slow
def test_words_are_the_verdict_the_first_batches_and_the_cost(notes):
    lines = describe_ablation(notes).splitlines()
    assert ": causal; " in lines[0]
    assert "Without them 100% of 176 unsafe prompts" in lines[0]
    assert sum(line.startswith("Batch ") for line in lines) == 20
    assert lines[-2] == "… and 2 more batches in ablate/batches.csv"
    assert lines[-1] == "880 forward passes of 271,590 tokens"


def test_an_expert_that_was_not_taken_away_alone_has_a_dash(found):
    first, second = alone_of(["L01_E03", "L00_E00"], found.experts)
    assert first.startswith("+0.5")
    assert second == MISSING
    assert alone_of(["L01_E03"], None) == [MISSING]


def test_a_check_without_figures_is_words_alone():
    empty = {"table": [], "per_batch": {}, "in_words": "All equal.", "forwards": 0, "tokens": 0}
    assert ablation_rows(empty).empty
    assert batch_rows(empty) == category_rows(empty) == []
    assert describe_ablation(empty) == "All equal.\n0 forward passes of 0 tokens"


def test_a_name_that_is_not_known_is_shown_as_it_is():
    assert set_name("something") == "something"
