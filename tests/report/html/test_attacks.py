"""The page's part on attacks: there where they were done, with prompts of nobody in it."""

from __future__ import annotations

from run_directory import write_identified

from moe_ray.report.html.attacks import attacks_part
from moe_ray.report.html.harness import harness_part
from moe_ray.run_directory import open_run
from moe_ray.storage.folder import Folder
from moe_ray.storage.stage import finish

RATE = {"value": 0.5, "low": 0.25, "high": 0.75, "n": 8}
PLAIN = {f"{label}_{when}": RATE for label in ("unsafe", "safe") for when in ("before", "after", "change")}


def test_the_parts_are_there_where_something_was_done(tmp_path):
    folder = Folder.open(str(tmp_path))
    write_identified(folder)
    assert attacks_part(open_run(str(tmp_path))) is None
    assert harness_part(open_run(str(tmp_path))) is None
    notes = {"figures": {"none": PLAIN, "base64": PLAIN | {"unsafe_lost": RATE}}, "about": {}, "left_out": {}}
    finish(folder.sub("attack"), {}, notes, seconds=1.0)
    row = {"task": "own", "metric": "acc", "is_rate": True, "before": RATE, "after": RATE, "change": RATE}
    finish(folder.sub("harness"), {}, {"figures": [row]}, seconds=1.0)
    run = open_run(str(tmp_path))
    part = attacks_part(run)
    assert [row[0] for row in part["rows"]] == ["no attack", "base64"]
    assert len(part["heads"]) == len(part["rows"][0])
    assert harness_part(run)["rows"] == [
        ["own", "acc", "50.0% [25.0%, 75.0%]", "50.0% [25.0%, 75.0%]", "+50.0 [+25.0, +75.0]", "8"]
    ]
    assert run.stages[-2:] == ["attack", "harness"]
