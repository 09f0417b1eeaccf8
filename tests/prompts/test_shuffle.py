"""Rows of a file come in any order, whatever the sizes of pieces and of rows."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_ray.prompts import shuffle
from moe_ray.prompts.shuffle import RowOrder
from moe_ray.prompts.table_file import TableFile


def stored(texts, per_batch):
    file = TableFile(pa.schema([("text", pa.string()), ("number", pa.int64())]))
    for start in range(0, len(texts), per_batch):
        some = texts[start : start + per_batch]
        file.append(pa.record_batch({"text": some, "number": range(start, start + len(some))}, schema=file.schema))
    file.finish()
    return RowOrder(file, np.array([len(text or "") for text in texts], dtype=np.int32))


@pytest.mark.slow
@settings(max_examples=60)
@given(st.integers(0, 60), st.integers(1, 9), st.integers(1, 12), st.integers(1, 300), st.integers(0, 99), st.data())
def test_rows_come_in_the_order_asked_for_in_pieces_of_bounded_size(number, per_batch, rows, size, seed, data):
    draw = np.random.default_rng(seed)
    texts = [None if length == 5 else "x" * length for length in draw.integers(0, 60, number).tolist()]
    order = draw.permutation(number)[: data.draw(st.integers(0, number))].astype(np.int32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shuffle, "ROWS_PER_PIECE", rows)
        patch.setattr(shuffle, "BYTES_PER_PIECE", size)
        pieces = list(stored(texts, per_batch).pieces(order))
        numbers = [table["number"].to_pylist() for table in stored(texts, per_batch).pieces(order, ["number"])]
    assert [number for piece in pieces for number in piece["number"].to_pylist()] == order.tolist()
    assert [text for piece in pieces for text in piece["text"].to_pylist()] == [texts[place] for place in order]
    assert numbers == [piece["number"].to_pylist() for piece in pieces]
    for piece in pieces:
        assert piece.num_rows <= rows
        lengths = [len(text or "") for text in piece["text"].to_pylist()]
        assert sum(lengths) <= size or len(lengths) == 1
