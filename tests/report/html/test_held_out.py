"""The page's figures before and after: from the summary, or from the stages while there is none."""

from __future__ import annotations

import pytest
from run_directory import write_identified

from moe_ray.report.html.held_out import held_out_blocks, held_out_parts
from moe_ray.run_directory import figures_of, open_run
from moe_ray.storage.folder import Folder
from moe_ray.storage.stage import finish


@pytest.mark.slow
def test_a_repaired_run_has_a_table_overall_and_one_for_each_label(run):
    (part,) = held_out_parts(held_out_blocks(run))
    assert part.overall.title == "Natural routing"
    unsafe, safe, _loss = part.overall.rows
    assert str(unsafe.cells[1]) == "75.0% [50.5%, 89.8%]"
    assert str(safe.cells[2]).startswith("0.0 points [")
    assert part.overall.rates == [unsafe, safe]
    assert [table.title for table in part.by_category] == ["unsafe prompts refused", "safe prompts refused"]
    assert [row.name for row in part.by_category[0].rows] == ["fraud", "theft"]
    figures = [part.overall.figure, *(table.figure for table in part.by_category)]
    assert len(set(figures)) == 3


def test_without_a_summary_the_finished_stages_are_read(tmp_path):
    folder = Folder.open(str(tmp_path))
    write_identified(folder)
    block = {"unsafe_refusal_rate": {"value": 0.5, "low": 0.25, "high": 0.75, "n": 8}}
    finish(folder.sub(figures_of("before")), {}, {"metrics": block}, seconds=1.0)
    before, after, change = held_out_blocks(open_run(str(tmp_path)))
    assert (before, after, change) == (block, None, None)
    finish(folder.sub(figures_of("after")), {}, {"metrics": block, "change": block}, seconds=1.0)
    assert held_out_blocks(open_run(str(tmp_path))) == (block, block, block)


def test_a_run_that_was_not_evaluated_has_no_part(identified):
    assert held_out_parts(held_out_blocks(identified)) == []
