"""Batches are identified in tasks that are worth a process and fit one; what a killed run has written is kept."""

import time

import numpy as np
import pandas as pd
import pytest
from answered_counts import answered

from moe_ray import pipeline
from moe_ray.config.identify import IdentifyConfig
from moe_ray.experts import Expert
from moe_ray.identification.findings import joined
from moe_ray.identification.identify import certainty_per_batch
from moe_ray.orchestration.jobs import identify as job
from moe_ray.orchestration.jobs.identify import _identify_groups, _plan, identify
from moe_ray.routing.count_tables import counts_to_table
from moe_ray.routing.counts import concat_counts
from moe_ray.run_directory import COUNTS, IDENTIFY, RISK, RunDirectory
from moe_ray.storage.folder import Folder
from moe_ray.testing.simulated_counts import Population, simulate


def test_every_batch_is_in_one_task_and_a_larger_model_makes_smaller_tasks():
    batches = list(range(100, 250))
    sizes = []
    for num_experts in (48, 20_000, 1_000_000):
        where = pd.DataFrame({"batch_idx": batches, "part": "a"})
        groups = [task["batch_idx"][0].as_py() for task in _plan(where, batches, num_experts)]
        assert [batch for group in groups for batch in group] == batches
        sizes.append(max(map(len, groups)))
    assert sizes == [64, 10, 1]


def test_a_task_names_the_parts_that_hold_its_batches_and_no_others():
    # Batch 2 is not identified; batch 3 is in two parts; rows come in any order.
    where = pd.DataFrame({"batch_idx": [3, 0, 2, 1, 3], "part": ["c", "b", "never", "a", "a"]})
    tasks = [task.to_pylist()[0] for task in _plan(where, [0, 1, 3], 100_000)]
    assert tasks == [{"batch_idx": [0, 1], "parts": ["a", "b"]}, {"batch_idx": [3], "parts": ["a", "c"]}]


def test_planning_a_million_prompts_takes_less_than_a_second():
    batches = np.arange(62_500)
    where = pd.DataFrame({"batch_idx": batches, "part": [f"part-{batch // 64}" for batch in batches]})
    started = time.process_time()
    tasks = _plan(where, batches.tolist(), 6_144)
    assert time.process_time() - started < 1
    assert len(tasks) == -(-62_500 // 32)


@pytest.mark.needs_ray
@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_parts_of_an_unfinished_identification_are_kept_and_others_removed(ray_cluster, tmp_path, monkeypatch):
    counts = simulate(Population(), num_batches=5, planted=(Expert(1, 3),), shift=0.5)
    run, config = RunDirectory.open(str(tmp_path)), IdentifyConfig(permutations=200, resamples=20)
    run.sub(COUNTS).write_table("part-0.parquet", counts_to_table(counts))
    monkeypatch.setattr(job, "_EXPERTS_PER_TASK", 128)
    folder = run.sub(IDENTIFY)
    found = identify(run, folder, config, seed=0)
    expected = pipeline.identify(counts, config=config, seed=0)
    assert found.masks.digest() == expected.masks.digest()
    certainty = certainty_per_batch(expected.risk, expected.masks, config)
    pd.testing.assert_frame_equal(found.certainty[certainty.columns], certainty)
    parts = folder.sub(RISK)
    assert parts.parquet_names() == [f"part-0000000{a}-0000000{b}.parquet" for a, b in ((0, 1), (2, 3), (4, 4))]
    pd.testing.assert_frame_equal(pd.read_parquet(parts.path), expected.risk)
    # As a kill leaves it: one part missing; and a part of an earlier way to cut batches.
    kept = {name: parts.fs.modified(parts.file(name)) for name in parts.parquet_names()[:2]}
    parts.fs.mv(parts.file("part-00000004-00000004.parquet"), parts.file("part-00000000-00000004.parquet"))
    again = identify(run, folder, config, seed=0)
    assert again.masks.digest() == found.masks.digest()
    pd.testing.assert_frame_equal(again.certainty, found.certainty)
    assert {name: parts.fs.modified(parts.file(name)) for name in kept} == kept
    pd.testing.assert_frame_equal(pd.read_parquet(parts.path), expected.risk)


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["attribution", "comply_refuse"])
def test_tasks_rank_by_the_scores_that_a_capture_stored(tmp_path, rule):
    counts = concat_counts([answered(seed, batch_idx=seed, planted=3.0) for seed in range(3)])
    config = IdentifyConfig(rule=rule, threshold=0.0, permutations=200, resamples=20)
    stored, parts = Folder.open(f"{tmp_path}/counts"), Folder.open(f"{tmp_path}/risk")
    stored.write_table("part-0.parquet", counts_to_table(counts))
    where = pd.DataFrame({"batch_idx": [0, 1, 2], "part": "part-0.parquet"})
    found = [
        _identify_groups(task, stored.url, parts.url, config, 0) for task in _plan(where, [0, 1, 2], num_experts=90_000)
    ]
    expected = pipeline.identify(counts, config=config, seed=0)
    assert len(found) == 2
    masks = joined(found, config, layers=(0, 1), num_experts=3).masks
    assert masks.digest() == expected.masks.digest()
    pd.testing.assert_frame_equal(pd.read_parquet(parts.path), expected.risk)


def test_batches_with_and_without_answers_have_the_same_columns(tmp_path):
    counts = concat_counts([answered(1), answered(2, batch_idx=1)])
    counts = counts.take((counts.batch_idx == 0) | (counts.role == "prompt"))
    config = IdentifyConfig(permutations=0, resamples=0)
    stored, parts = Folder.open(f"{tmp_path}/counts"), Folder.open(f"{tmp_path}/risk")
    stored.write_table("part-0.parquet", counts_to_table(counts))
    where = pd.DataFrame({"batch_idx": [0, 1], "part": "part-0.parquet"})
    for task in _plan(where, [0, 1], num_experts=200_000):
        _identify_groups(task, stored.url, parts.url, config, 0)
    risk = pd.read_parquet(parts.path)
    assert risk.groupby("batch_idx")["attribution_diff"].count().tolist() == [6, 0]
