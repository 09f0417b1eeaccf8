"""The stage writes a pickle for pandas users only while it is small."""

import logging

from moe_ray.experts import Expert, masks_from_experts
from moe_ray.identification.pandas_export import export_bytes
from moe_ray.orchestration.stages import identify as stage
from moe_ray.storage.folder import Folder


def test_a_pickle_that_would_be_too_large_is_not_written_and_a_line_says_what_to_read(tmp_path, monkeypatch, caplog):
    masks = masks_from_experts({0: (Expert(0, 1),)}, layers=(0,), num_experts=4)
    assert export_bytes(masks) == 16
    monkeypatch.setattr(stage, "MOST_EXPORT_BYTES", 15)
    with caplog.at_level(logging.INFO):
        stage._export(None, Folder.open(str(tmp_path)), masks)
    assert "no pickle for pandas users" in caplog.text
    assert "risk_differences.parquet with pandas.read_parquet" in caplog.text
    assert list(tmp_path.iterdir()) == []
