"""Examples that cannot be captured get a reason; batches go on without them."""

import pandas as pd

from moe_ray.prompts.quarantine import (
    EMPTY,
    TOO_LONG,
    quarantine_frame,
    training_examples,
    without_quarantined,
)


def test_a_batch_goes_on_without_its_quarantined_examples():
    examples = pd.DataFrame({"batch_idx": [0, 0, 1, 1], "in_batch_idx": [0, 1, 0, 1], "label": list("abcd")})
    row = {"batch_idx": 1, "in_batch_idx": 0, "id": "x", "label": "c", "category": "", "reason": EMPTY, "detail": ""}
    quarantined = quarantine_frame([row, row])
    assert len(quarantined) == 1
    assert list(without_quarantined(examples, quarantined)["label"]) == ["a", "b", "d"]
    assert len(without_quarantined(examples, quarantine_frame([]))) == 4


def test_training_leaves_out_what_is_in_quarantine_and_what_was_cut_and_could_not_be_answered():
    rows = [{"batch_idx": 0, "in_batch_idx": index, "id": str(index), "label": "safe"} for index in range(4)]
    examples = pd.DataFrame(rows).assign(target=["yes", None, None, "no"])
    listed = [{**row, "category": "", "reason": TOO_LONG, "detail": ""} for row in rows]
    quarantined, truncated = quarantine_frame(listed[:1]), quarantine_frame([listed[2], listed[3]])
    # 1 has no target and no excuse: training must refuse it by name.
    assert training_examples(examples, quarantined, truncated)["id"].tolist() == ["1", "3"]
    nothing = quarantine_frame([])
    assert training_examples(examples, nothing, nothing)["id"].tolist() == ["0", "1", "2", "3"]
