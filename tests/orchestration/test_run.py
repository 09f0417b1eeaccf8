"""A run hands on what it has done when its settings change, and accounts for its time."""

from dataclasses import replace

import pytest

from moe_ray.config.run import Config
from moe_ray.orchestration.run import Run
from moe_ray.run_directory import SWEEP, RunDirectory
from moe_ray.storage.stage import Stage


@pytest.fixture
def run(tmp_path):
    config = Config(run_dir=str(tmp_path / "run"))
    return Run(config, config.model, None, RunDirectory.open(config.run_dir))


def stage(name, **notes):
    return Stage(name=name, inputs={"of": name}, work=lambda folder: notes)


def test_with_other_settings_it_goes_on_from_what_was_done(run):
    run.do(stage("capture"))
    run.seconds.add("start", 1.0)
    other = run.with_config(replace(run.config, seed=7))
    assert (run.config.seed, other.config.seed) == (0, 7)
    assert other.outcomes == run.outcomes
    assert other.directory.folder.url == run.directory.folder.url
    assert other.models is run.models
    assert list(other.seconds.so_far()) == ["capture", "start", "other", "total"]


def test_what_the_changed_run_does_is_not_the_first_ones(run):
    run.do(stage("capture"))
    other = run.with_config(run.config)
    other.do(stage("identify"))
    assert list(run.outcomes) == ["capture"]
    assert list(other.outcomes) == ["capture", "identify"]


def test_the_winner_has_the_sweeps_settings_and_sweeps_no_more(run):
    run.config = replace(run.config, sweep=replace(run.config.sweep, run=True))
    run.do(stage(SWEEP, winner={"identify.top_k": 7, "finetune.epochs": 2}))
    winner = run.winner()
    assert (winner.config.identify.top_k, winner.config.finetune.epochs, winner.config.sweep.run) == (7, 2, False)
    assert winner.config.identify.threshold == run.config.identify.threshold


def test_a_stage_that_was_done_before_is_reused_and_keeps_its_seconds(run):
    first = run.do(stage("capture"))
    again = Run(run.config, run.model, None, RunDirectory(run.directory.folder))
    again.do(stage("capture"))
    again.do(stage("identify"))
    assert (run.reused, again.reused) == ([], ["capture"])
    spent = again.seconds.so_far()
    assert (spent["capture"].total, spent["capture"].is_reused) == (first.seconds, True)
    assert not spent["identify"].is_reused
