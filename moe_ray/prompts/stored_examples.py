"""Some of the stored examples, read by row groups, for processes that take a few of very many."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_ray.prompts.example_tables import BATCHES
from moe_ray.storage.folder import Folder

StoredExample = dict[str, Any]
"""A row of the stored batches."""

COLUMNS = ["batch_idx", "in_batch_idx", "id", "label", "category", "messages", "response", "pair", "target"]


class StoredExamples:
    """The examples of a run's batches, by their position.

    The file's footer, which grows with it, is read once. Safe to use from several threads.

    Args:
        folder: holds the stored batches.
        name: their file.
    """

    def __init__(self, folder: Folder, name: str = BATCHES) -> None:
        self._folder, self._name = folder, name

    @cached_property
    def _footer(self) -> tuple[Any, npt.NDArray[np.int64]]:
        """Of the file; and where each of its row groups starts, with the number of rows behind."""
        with self._folder.open_parquet(self._name) as file:
            footer = file.metadata
        sizes = [footer.row_group(group).num_rows for group in range(footer.num_row_groups)]
        return footer, np.cumsum([0, *sizes])

    def read(self, positions: npt.NDArray[np.int64]) -> list[StoredExample]:
        """The examples at these positions, ascending; only the row groups that hold some are loaded."""
        footer, starts = self._footer
        groups = np.unique(np.searchsorted(starts, positions, side="right") - 1)
        kept = np.concatenate([np.arange(starts[group], starts[group + 1]) for group in groups])
        with self._folder.open_parquet(self._name, footer=footer) as file:
            table = file.read_row_groups(groups.tolist(), columns=COLUMNS)
        examples: list[StoredExample] = table.take(np.searchsorted(kept, positions)).to_pylist()
        return examples
