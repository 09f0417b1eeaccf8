"""The stage controls for what prompts say they are about, and writes a pickle for pandas users only while it is small."""

import logging
from dataclasses import replace
from types import SimpleNamespace

import pytest
from prompt_tokens import by_prompt_tokens

from moe_ray.config.run import Config
from moe_ray.experts import Expert, masks_from_experts
from moe_ray.identification.controls import controls_of_batches, survival
from moe_ray.identification.pandas_export import export_bytes
from moe_ray.orchestration.stages import identify as stage
from moe_ray.routing.count_tables import counts_to_table
from moe_ray.run_directory import COUNTS, PROMPTS, RunDirectory
from moe_ray.storage.folder import Folder
from moe_ray.testing.simulated_counts import Population, simulate_confounded

PLANTED = (Expert(0, 3), Expert(1, 5))


def test_a_pickle_that_would_be_too_large_is_not_written_and_a_line_says_what_to_read(tmp_path, monkeypatch, caplog):
    masks = masks_from_experts({0: (Expert(0, 1),)}, layers=(0,), num_experts=4)
    assert export_bytes(masks) == 16
    monkeypatch.setattr(stage, "MOST_EXPORT_BYTES", 15)
    with caplog.at_level(logging.INFO):
        stage._export(None, Folder.open(str(tmp_path)), masks)
    assert "no pickle for pandas users" in caplog.text
    assert "risk_differences.parquet with pandas.read_parquet" in caplog.text
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def captured(tmp_path):
    """A run whose counts and prompts are stored, its counts, the prompts' fields, and masks without any of batch 2."""
    population = Population(num_layers=2, num_experts=8)
    counts, fields = simulate_confounded(population, num_batches=5, by_harm=PLANTED, shift=0.5)
    directory = RunDirectory.open(str(tmp_path))
    directory.sub(COUNTS).write_table("part-0.parquet", counts_to_table(counts))
    directory.sub(PROMPTS).write_table("batches.parquet", fields)
    selected = {batch: PLANTED if batch != 2 else () for batch in range(5)}
    masks = masks_from_experts(selected, layers=(0, 1), num_experts=8)
    config = Config()
    config = replace(config, identify=by_prompt_tokens(permutations=200))
    return SimpleNamespace(directory=directory, config=config), counts, fields, masks


def test_controls_are_those_of_the_batches_with_unsafe_experts(captured, monkeypatch):
    run, counts, fields, masks = captured
    monkeypatch.setattr(stage, "_BATCHES_AT_ONCE", 2)
    table, number = stage._controls(run, masks)
    expected = controls_of_batches(counts, fields, masks.selected, run.config.identify)
    assert number == 4
    assert table.equals(expected)
    assert survival(table, number)["topic"] == survival(expected, 4)["topic"]
    assert sorted(set(table["batch_idx"])) == [0, 1, 3, 4]


def test_of_many_batches_some_are_controlled_spread_over_all(captured, monkeypatch):
    run, _, _, masks = captured
    monkeypatch.setattr(stage, "MOST_CONTROLLED", 2)
    table, number = stage._controls(run, masks)
    assert (number, sorted(set(table["batch_idx"]))) == (2, [0, 3])


def test_prompts_that_say_neither_topic_nor_template_are_not_controlled(captured):
    run, _, fields, masks = captured
    run.directory.sub(PROMPTS).write_table("batches.parquet", fields.assign(topic="", template=None))
    table, number = stage._controls(run, masks)
    assert (len(table), number) == (0, 0)
