"""The stored batches of a run, read in the parts that are needed: whole columns, or one piece after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd
import pyarrow as pa

from moe_ray.prompts.example_tables import BATCHES
from moe_ray.storage.folder import Folder

_FEW_VALUES = ("label", "category", "split", "topic", "template")
"""Columns of few different texts, of which each is in memory once."""
_OF_LATER_VERSIONS = ("topic", "template")
"""Columns that the tables of earlier versions lack."""
_OF_TEXTS = ["batch_idx", "in_batch_idx", "label", "messages"]
_TEXTS = 20_000


class StoredBatches:
    """The table of batches: a row per training example, quarantined ones too, ordered by batch and place in it.

    Args:
        folder: that holds it.
    """

    def __init__(self, folder: Folder) -> None:
        self._folder = folder

    def __len__(self) -> int:
        with self._folder.open_parquet(BATCHES) as file:
            return int(file.metadata.num_rows)

    def columns(self, *names: str) -> pd.DataFrame:
        """Some columns of all examples; labels, categories, splits, topics and templates are categoricals.

        Args:
            names: of the columns; those with long texts are better read with `pieces`.
        """
        with self._folder.open_parquet(BATCHES, needs=_needed(names)) as file:
            groups = [_with_categoricals(file.read_row_group(i, list(names))) for i in range(file.num_row_groups)]
        frame: pd.DataFrame = pa.concat_tables(groups).unify_dictionaries().to_pandas(ignore_metadata=True)
        for name in _FEW_VALUES:
            if name in frame:
                frame[name] = frame[name].cat.set_categories(sorted(frame[name].cat.categories))
        return frame

    def pieces(self, *names: str) -> Iterator[pd.DataFrame]:
        """The examples, some hundreds at a time.

        Args:
            names: of the columns; none = all.
        """
        with self._folder.open_parquet(BATCHES, needs=_needed(names)) as file:
            for group in range(file.num_row_groups):
                yield file.read_row_group(group, list(names) or None).to_pandas()

    def first(self, most: int) -> pd.DataFrame:
        """The first examples, at most so many."""
        found: list[pd.DataFrame] = []
        for piece in self.pieces():
            found.append(piece)
            if sum(map(len, found)) >= most:
                break
        return pd.concat(found, ignore_index=True).iloc[:most]

    def texts(self, most: int = _TEXTS) -> pd.DataFrame:
        """What prompts say: `batch_idx, in_batch_idx, label, messages` (JSON) of all examples.

        Args:
            most: where there are more examples, whole pieces spread evenly over the table are read, so many rows at most.
        """
        with self._folder.open_parquet(BATCHES, needs=_OF_TEXTS) as file:
            sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
            number = len(sizes)
            if sum(sizes) > most:
                number = max(1, most // max(sizes))
            chosen: Sequence[int] = (np.arange(number) * len(sizes) // max(1, number)).tolist()
            frame: pd.DataFrame = file.read_row_groups(chosen, _OF_TEXTS).to_pandas()
        return frame


def _needed(names: Sequence[str]) -> list[str]:
    return [name for name in names if name not in _OF_LATER_VERSIONS]


def _with_categoricals(table: pa.Table) -> pa.Table:
    for place, name in enumerate(table.column_names):
        if name in _FEW_VALUES:
            table = table.set_column(place, name, table[name].cast(pa.string()).dictionary_encode())
    return table
