"""A page has a figure for everything that the run has data for, and for nothing else."""

import re

import pytest

from moe_ray.config.report import ReportConfig
from moe_ray.report.html.experts import risk_grids
from moe_ray.report.html.run_figures import draw_run


@pytest.fixture(scope="module")
def drawn(identified):
    return draw_run(identified, risk_grids(identified, ReportConfig(batches=2)), [])


@pytest.mark.slow
def test_a_run_that_was_only_identified_has_no_figure_of_training_sweep_or_answers(drawn):
    batches = [name for name in drawn if name.startswith("risk_batch_")]
    assert len(batches) == 2
    assert set(drawn) - set(batches) == {"risk_overall", "overlap", "categories", "union_growth"}


@pytest.mark.slow
def test_every_figure_has_a_title_and_identifiers_of_its_own(drawn):
    identifiers = [set(re.findall(r'\bid="([^"]+)"', svg)) for svg in drawn.values()]
    assert all(identifiers)
    assert sum(map(len, identifiers)) == len(set.union(*identifiers))
    assert "Risk difference of batch 0" in drawn["risk_batch_0"]
