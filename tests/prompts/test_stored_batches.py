"""Parts of the stored batches are the same rows that the whole table has."""

import numpy as np
import pandas as pd
import pytest
from prompt_examples import many

from moe_ray.prompts import stored_batches
from moe_ray.prompts.batches import assemble_batches
from moe_ray.prompts.example_tables import BATCHES, batches_to_frame
from moe_ray.prompts.stored_batches import StoredBatches


@pytest.fixture(params=[7, 16, 1024])
def stored(request, folder):
    """Eight batches of three categories, in row groups of several sizes, and the whole table."""
    examples = many(32, 32, "b") + many(16, 16, "a", start=100) + many(16, 16, start=200)
    frame = batches_to_frame(assemble_batches(examples).batches)
    folder.write_table(BATCHES, frame, row_group_size=request.param)
    return StoredBatches(folder), frame


def test_columns_are_those_of_the_whole_table(stored):
    some, whole = stored
    assert len(some) == len(whole) == 128
    got = some.columns("category", "batch_idx", "label")
    assert got.astype(object).equals(whole[["category", "batch_idx", "label"]].astype(object))
    # In the order of their names, so that what is grouped by them comes as from texts.
    assert list(got["category"].cat.categories) == ["", "a", "b"]
    sizes = got.groupby("category")["batch_idx"].nunique()
    assert sizes.to_dict() == whole.groupby("category")["batch_idx"].nunique().to_dict()


@pytest.mark.slow
def test_pieces_one_after_the_other_are_the_table(stored):
    some, whole = stored
    assert pd.concat(some.pieces(), ignore_index=True).astype(object).equals(whole.astype(object))
    assert pd.concat(some.pieces("id"), ignore_index=True)["id"].equals(whole["id"])
    for most in (1, 16, 20, 500):
        assert some.first(most).astype(object).equals(whole.iloc[:most].astype(object))


def test_texts_are_all_or_spread_evenly(stored):
    some, whole = stored
    names = ["batch_idx", "in_batch_idx", "label", "messages"]
    assert some.texts().equals(whole[names])
    spread = some.texts(most=40)
    assert 0 < len(spread) <= 40 or len(whole) <= 1024 == stored_batches_size(some)
    assert spread.merge(whole[names]).equals(spread)
    if len(spread) < len(whole):
        assert np.ptp(spread["batch_idx"]) >= 3


def stored_batches_size(some):
    """Rows of the first piece."""
    return 1024 if len(next(some.pieces())) == 128 else 0


def test_columns_of_few_texts_are_named_as_the_table_has_them():
    assert set(stored_batches._FEW_VALUES) < set(batches_to_frame(assemble_batches(many(8, 8)).batches).columns)
