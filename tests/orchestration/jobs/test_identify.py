"""Batches are identified by group, to the last bit as in one process; what a killed run has written is kept."""

import numpy as np
import pandas as pd
import pytest
from answered_counts import answered
from prompt_tokens import by_prompt_tokens

from moe_ray import pipeline
from moe_ray.errors import InputError
from moe_ray.experts import Expert
from moe_ray.identification.identify import certainty_per_batch
from moe_ray.identification.risk_tables import RiskParts
from moe_ray.orchestration.jobs import identify as job
from moe_ray.orchestration.jobs.identify import RiskSink, _identify_batch, _parts_done, identify, num_blocks
from moe_ray.routing.count_tables import counts_to_table
from moe_ray.routing.counts import concat_counts
from moe_ray.run_directory import COUNTS, IDENTIFY, RISK, RunDirectory
from moe_ray.storage.folder import Folder
from moe_ray.testing.simulated_counts import Population, simulate

QUICK = by_prompt_tokens(permutations=200, resamples=20)


def rows_of(counts, config=QUICK):
    """What groups of the counts give, in the order of their batches."""
    return [_identify_batch(counts_to_table(counts.take(counts.batch_idx == b)), config, 0) for b in unique(counts)]


def unique(counts):
    return np.unique(counts.batch_idx).tolist()


@pytest.fixture(scope="module")
def counts():
    return simulate(Population(), num_batches=7, planted=(Expert(1, 3),), shift=0.5)


@pytest.mark.parametrize(
    ("rows", "experts", "cpus", "blocks"),
    [
        (0, 1024, 4, 1),
        (16, 1024, 4, 1),
        (4096, 1024, 4, 4),
        # As many as keep every core busy some times over, and larger ones from there on.
        (1_600_000, 1024, 4, 49),
        (1_600_000, 6144, 4, 293),
        (1_600_000, 1024, 1000, 1563),
    ],
)
def test_blocks_are_worth_a_process_and_fit_one(rows, experts, cpus, blocks):
    assert num_blocks(rows, experts, cpus=cpus) == blocks


@pytest.mark.slow
@pytest.mark.parametrize(
    ("experts_per_part", "starts", "expected"),
    [
        (200_000, [], [(0, 6)]),
        (128, [], [(0, 1), (2, 3), (4, 5), (6, 6)]),
        (1, [], [(batch, batch) for batch in range(7)]),
        # A part of batches 10 and on, and one between 2 and 3, are there: no new one reaches over them.
        (200_000, [10], [(0, 6)]),
        (200_000, [3, 10], [(0, 3), (4, 6)]),
    ],
)
def test_parts_hold_few_experts_and_reach_over_none_that_is_there(
    experts_per_part, starts, expected, counts, tmp_path, monkeypatch
):
    monkeypatch.setattr(job, "_EXPERTS_PER_PART", experts_per_part)
    folder = Folder.open(str(tmp_path))
    blocks = rows_of(counts)
    # Blocks of any number of batches.
    found = RiskSink(folder, QUICK, 0, starts).write([blocks[0].slice(0, 0), *blocks], None)
    assert folder.parquet_names() == [f"part-{first:08d}-{last:08d}.parquet" for first, last in expected]
    assert [len(table) for table in found.findings] == [last - first + 1 for first, last in expected]
    pd.testing.assert_frame_equal(pd.read_parquet(folder.path), pipeline.identify(counts, config=QUICK).risk)


@pytest.mark.slow
def test_parts_that_hold_a_batch_of_another_go_and_the_others_stay(counts, tmp_path):
    folder = Folder.open(str(tmp_path))
    for batches in ([0, 1], [2, 3], [1, 2], [4]):
        RiskSink(folder, QUICK, 0, []).write([rows_of(counts)[b] for b in batches], None)
    done = _parts_done(folder)
    assert [batches.tolist() for batches in done.values()] == [[0, 1], [2, 3], [4]]
    assert folder.parquet_names() == list(done)


@pytest.mark.needs_ray
@pytest.mark.slow
@pytest.mark.filterwarnings("default")
class TestWithRay:
    @pytest.fixture
    def run(self, ray_cluster, tmp_path):
        return RunDirectory.open(str(tmp_path))

    def store(self, run, counts, parts):
        """The counts in so many parts, each of which holds some rows of many batches."""
        for part in range(parts):
            chosen = counts.take(np.arange(len(counts)) % parts == part)
            run.sub(COUNTS).write_table(f"part-{part}.parquet", counts_to_table(chosen))

    def test_it_is_what_one_process_finds_to_the_last_bit_and_goes_on_where_it_was_killed(
        self, counts, run, monkeypatch
    ):
        self.store(run, counts, parts=3)
        # More than one block, and parts of two batches.
        monkeypatch.setattr(job, "_ROWS_PER_BLOCK", 40)
        folder = run.sub(IDENTIFY)
        found = identify(run, folder, QUICK, seed=0)
        expected = pipeline.identify(counts, config=QUICK, seed=0)
        assert found.masks.digest() == expected.masks.digest()
        certainty = certainty_per_batch(expected.risk, expected.masks, QUICK)
        pd.testing.assert_frame_equal(found.certainty[certainty.columns], certainty)
        risk = RiskParts(folder.sub(RISK))
        assert len(risk.names) > 1
        pd.testing.assert_frame_equal(risk.frame(), expected.risk)
        # As a kill leaves it: one part, not the first, is missing.
        lost = risk.names[1]
        risk.folder.remove(lost)
        kept = {name: risk.folder.fs.modified(risk.folder.file(name)) for name in risk.names if name != lost}
        again = identify(run, folder, QUICK, seed=0)
        assert again.masks.digest() == found.masks.digest()
        pd.testing.assert_frame_equal(again.certainty, found.certainty)
        assert {name: risk.folder.fs.modified(risk.folder.file(name)) for name in kept} == kept
        pd.testing.assert_frame_equal(RiskParts(folder.sub(RISK)).frame(), expected.risk)

    def test_batches_of_one_label_are_named_and_get_no_mask(self, counts, run, caplog):
        kept = counts.take((counts.batch_idx != 2) | (counts.label == "safe"))
        self.store(run, kept, parts=1)
        found = identify(run, run.sub(IDENTIFY), QUICK, seed=0)
        assert found.certainty["batch_idx"].tolist() == [0, 1, 3, 4, 5, 6]
        assert "batches [2] have prompt tokens of one label only" in caplog.text
        self.store(run, counts.take(counts.label == "safe"), parts=1)
        run.sub(f"{IDENTIFY}/{RISK}").delete()
        with pytest.raises(InputError, match="none of 7 batches has prompt tokens of both labels"):
            identify(run, run.sub(IDENTIFY), QUICK, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["attribution", "comply_refuse"])
def test_groups_rank_by_the_scores_that_a_capture_stored(tmp_path, rule):
    counts = concat_counts([answered(seed, batch_idx=seed, planted=3.0) for seed in range(3)])
    config = by_prompt_tokens(rule=rule, threshold=0.0, permutations=200, resamples=20)
    folder = Folder.open(str(tmp_path))
    RiskSink(folder, config, 0, []).write(rows_of(counts, config), None)
    pd.testing.assert_frame_equal(pd.read_parquet(folder.path), pipeline.identify(counts, config=config, seed=0).risk)


def test_batches_with_and_without_answers_have_the_same_columns(tmp_path):
    counts = concat_counts([answered(1), answered(2, batch_idx=1)])
    counts = counts.take((counts.batch_idx == 0) | (counts.role == "prompt"))
    config = by_prompt_tokens(permutations=0, resamples=0)
    folder = Folder.open(str(tmp_path))
    RiskSink(folder, config, 0, []).write(rows_of(counts, config), None)
    risk = pd.read_parquet(folder.path)
    assert risk.groupby("batch_idx")["attribution_diff"].count().tolist() == [6, 0]
