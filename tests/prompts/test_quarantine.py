"""Examples that cannot be captured get a reason; batches go on without them."""

import pandas as pd

from moe_ray.prompts.quarantine import (
    EMPTY,
    TOO_LONG,
    quarantine_frame,
    read_training_examples,
    without_quarantined,
)
from moe_ray.report.run_text import describe_capture
from moe_ray.storage.folder import Folder


def test_a_batch_goes_on_without_its_quarantined_examples():
    examples = pd.DataFrame({"batch_idx": [0, 0, 1, 1], "in_batch_idx": [0, 1, 0, 1], "label": list("abcd")})
    row = {"batch_idx": 1, "in_batch_idx": 0, "id": "x", "label": "c", "category": "", "reason": EMPTY, "detail": ""}
    quarantined = quarantine_frame([row, row])
    assert len(quarantined) == 1
    assert list(without_quarantined(examples, quarantined)["label"]) == ["a", "b", "d"]
    assert len(without_quarantined(examples, quarantine_frame([]))) == 4


def test_training_leaves_out_what_is_in_quarantine_and_what_was_cut_and_could_not_be_answered(tmp_path):
    rows = [{"batch_idx": 0, "in_batch_idx": place, "id": str(place), "label": "safe"} for place in range(4)]
    targets = ["yes", None, None, "no"]
    batches, routing = (Folder.open(str(tmp_path / name)) for name in ("batches", "routing"))
    batches.write_table("batches.parquet", pd.DataFrame(rows).assign(target=targets))
    listed = [{**row, "category": "", "reason": TOO_LONG, "detail": ""} for row in rows]
    routing.write_table("quarantine.parquet", quarantine_frame(listed[:1]))
    routing.write_table("truncated.parquet", quarantine_frame([listed[2], listed[3]]))
    # 1 has no target and no excuse: training must refuse it by name.
    assert read_training_examples(batches, routing)["id"].tolist() == ["1", "3"]
    assert read_training_examples(batches, None)["id"].tolist() == ["0", "1", "2", "3"]


def test_the_number_of_quarantined_examples_is_said():
    notes = {"tokens": 1000, "examples": 50, "quarantined": 2, "truncated": 0, "padding_share": 0.05}
    said = describe_capture({**notes, "reasons": {TOO_LONG: 2}})
    assert "1,000 tokens of 48 examples" in said
    assert "2 examples in quarantine (2 too_long)" in said
