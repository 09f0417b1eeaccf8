"""The page's part on the causal check: there where it was done, hostile text as text, and beside every expert."""

from __future__ import annotations

import pytest
from ablation_run import write_ablation
from html_page import Page
from run_directory import write_identified, write_repaired

from moe_ray.config.report import ReportConfig
from moe_ray.report.html.cause import cause_part
from moe_ray.report.html.page import build_report
from moe_ray.run_directory import open_run
from moe_ray.storage.folder import Folder

HOSTILE = ("fraud<script>alert(1)</script>", "theft")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = Folder.open(str(tmp_path_factory.mktemp("ablated") / "run"))
    write_identified(folder, categories=HOSTILE)
    write_repaired(folder, categories=HOSTILE)
    write_ablation(folder, categories=HOSTILE)
    return open_run(folder.path)


def test_a_run_without_the_check_has_no_such_part(identified):
    assert cause_part(identified) is None


@pytest.mark.slow
def test_sets_categories_batches_and_experts_have_their_rows(run):
    part = cause_part(run)
    assert part["heads"][0] == "without"
    assert len(part["rows"]) == 8
    assert len(part["categories"]) == 2
    assert len(part["batches"]["rows"]) == 4
    assert {row["expert"] for row in part["experts"]["rows"]} == {"L01_E03", "L02_E02"}
    assert part["counted"] == "batches"


@pytest.mark.slow
def test_the_page_says_the_verdict_and_what_is_lost_without_each_expert(run):
    page = Page(build_report(run, ReportConfig()).html)
    assert "Is it the cause?" in page.text
    assert page.text.count(": causal;") == 2  # in the first paragraph, and in its part
    assert "Routing is an observation, not a cause" not in page.text
    assert "lost without it (nats/token)" in page.text
    assert page.tags["script"] == 1  # the page's own
    assert HOSTILE[0] in page.text
