"""The training batches of a run, read from its table: only those that are asked for, a row group at a time.

A worker that took the whole table would hold every other worker's examples too.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from moe_ray.finetuning.batch_rows import Survey, refuse_missing_targets
from moe_ray.prompts.batches import MIXED, Batch
from moe_ray.prompts.example_tables import BATCHES, frame_to_batches
from moe_ray.prompts.quarantine import QUARANTINE, TRUNCATED, training_examples
from moe_ray.storage.folder import Folder


class TrainingBatches:
    """A `BatchSource` over a run's table of prompts; examples that cannot be trained on are left out.

    Args:
        prompts: the run's folder with the table.
        capture: its folder with the tables of examples that were not counted, or only in part.
    """

    def __init__(self, prompts: Folder, capture: Folder) -> None:
        self._prompts = prompts
        self._quarantined, self._truncated = capture.read_frame(QUARANTINE), capture.read_frame(TRUNCATED)
        with prompts.open_parquet(BATCHES) as file:
            self._batches_in: list[list[int]] = [
                file.read_row_group(group, columns=["batch_idx"])["batch_idx"].unique().to_pylist()
                for group in range(file.num_row_groups)
            ]
        self._last_group = {batch_idx: group for group, ids in enumerate(self._batches_in) for batch_idx in ids}

    def survey(self, trained: Collection[int], *, lengths: bool) -> Survey:
        """What there is; see `BatchSource`."""
        columns = ["batch_idx", "in_batch_idx", "id", "label", "category", "target", *(["messages"] if lengths else [])]
        is_trained = frozenset(trained).__contains__
        categories: dict[int, set[str]] = defaultdict(set)
        num_bytes: dict[int, int] = defaultdict(int)
        for _, frame in self._frames(self._last_group, columns):
            for batch_idx, label, category in zip(frame["batch_idx"], frame["label"], frame["category"], strict=True):
                categories[batch_idx] |= {category} if label == "unsafe" else set()
            chosen = frame[np.fromiter(map(is_trained, frame["batch_idx"]), dtype=bool)]
            refuse_missing_targets(chosen["id"][chosen["target"].fillna("") == ""].tolist())
            if lengths:
                for batch_idx, *texts in zip(chosen["batch_idx"], chosen["messages"], chosen["target"], strict=True):
                    num_bytes[batch_idx] += sum(len(text.encode()) for text in texts)
        return Survey(
            categories={
                batch_idx: (min(of_batch) if len(of_batch) == 1 else MIXED) or MIXED
                for batch_idx, of_batch in categories.items()
            },
            lengths=num_bytes,
        )

    def read(self, batch_ids: Collection[int]) -> Iterator[Batch]:
        """These batches, each once, by `batch_idx`."""
        rows = pd.DataFrame()
        for group, frame in self._frames(batch_ids, None):
            rows = pd.concat([rows, frame]) if len(rows) else frame
            # A batch at the end of a row group may go on in the next one.
            goes_on = np.asarray([self._last_group[batch_idx] > group for batch_idx in rows["batch_idx"]], dtype=bool)
            yield from frame_to_batches(rows[~goes_on])
            rows = rows[goes_on]

    def _frames(self, batch_ids: Collection[int], columns: Sequence[str] | None) -> Iterator[tuple[int, pd.DataFrame]]:
        """Each row group that holds some of these batches, and its rows of them that can be trained on."""
        # Everything here is looked up by the group's own batches: a search among all of them for each group would be
        # quadratic.
        wanted = frozenset(batch_ids)
        with self._prompts.open_parquet(BATCHES) as file:
            for group, batches in enumerate(self._batches_in):
                if not (chosen := [batch_idx for batch_idx in batches if batch_idx in wanted]):
                    continue
                table = file.read_row_group(group, columns=columns)
                table = table.filter(pc.is_in(table["batch_idx"], value_set=pa.array(chosen, pa.int64())))
                first, last = min(chosen), max(chosen)
                yield (
                    group,
                    training_examples(
                        table.to_pandas(),
                        _between(self._quarantined, first, last),
                        _between(self._truncated, first, last),
                    ),
                )


def _between(frame: pd.DataFrame, first: int, last: int) -> pd.DataFrame:
    """The rows of these batches, of a table that is in their order."""
    start, end = np.searchsorted(frame["batch_idx"], [first, last + 1])
    return frame.iloc[start:end]
