"""Stored examples are read by position, and no more of the file than the row groups that hold them."""

import json

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from moe_ray.prompts.example_tables import BATCHES
from moe_ray.prompts.stored_examples import COLUMNS, StoredExamples
from moe_ray.storage.folder import Folder

FRAME = pd.DataFrame(
    {
        "batch_idx": np.arange(20) // 4,
        "in_batch_idx": np.arange(20) % 4,
        "id": [f"row{row}" for row in range(20)],
        "label": ["safe", "unsafe"] * 10,
        "category": [""] * 20,
        "messages": [json.dumps([{"role": "user", "content": f"prompt {row}"}]) for row in range(20)],
        "response": [None, "an answer"] * 10,
        "pair": [None] * 20,
        "target": ["No."] * 20,
    }
)


@pytest.fixture
def stored(tmp_path):
    folder = Folder.open(str(tmp_path))
    folder.write_table(BATCHES, FRAME, row_group_size=6)
    return StoredExamples(folder)


@pytest.mark.parametrize("positions", [[0], [5, 6], [19], [1, 7, 8, 18], list(range(20))])
def test_examples_are_those_at_the_positions_in_their_order(stored, positions):
    examples = stored.read(np.array(positions))
    assert [example["id"] for example in examples] == [f"row{position}" for position in positions]
    expected = FRAME.iloc[positions][COLUMNS].astype(object).where(FRAME.iloc[positions][COLUMNS].notna(), None)
    assert examples == expected.to_dict("records")


def test_only_row_groups_that_hold_some_are_loaded_and_the_footer_once(stored, monkeypatch):
    loaded, footers = [], []
    read, begin = pq.ParquetFile.read_row_groups, pq.ParquetFile.__init__

    def opened(self, *args, **named):
        footers.append(named["metadata"])
        begin(self, *args, **named)

    monkeypatch.setattr(pq.ParquetFile, "__init__", opened)
    monkeypatch.setattr(
        pq.ParquetFile,
        "read_row_groups",
        lambda self, groups, **named: loaded.append(groups) or read(self, groups, **named),
    )
    stored.read(np.array([1, 13]))
    stored.read(np.array([7]))
    assert loaded == [[0, 2], [1]]
    assert [footer is None for footer in footers] == [True, False, False]
