"""Rows of a table file in any order, with as much memory as a few pieces of the result take.

Where the rows that are wanted do not fit in memory, one pass over the file sorts them into buckets on disk, each of which
holds one piece of the result, and each bucket is then ordered on its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from moe_ray.prompts.table_file import TableFile

ROWS_PER_PIECE = 1 << 15
BYTES_PER_PIECE = 64 << 20
"""What a piece of the result has at most; a single row may be longer."""
_READ_AHEAD = 4
"""Pieces' worth of rows that are sorted into buckets at once: more of them make longer runs on disk."""
_RANK = "__rank__"


class RowOrder:
    """A table file whose rows can be had in any order.

    Args:
        file: finished.
        num_bytes: per row, about how much memory it takes.
    """

    def __init__(self, file: TableFile, num_bytes: npt.NDArray[np.int32]) -> None:
        self.file, self.num_bytes = file, num_bytes
        self._starts = np.concatenate([[0], np.cumsum(file.num_rows, dtype=np.int64)])

    def pieces(self, order: npt.NDArray[np.int32], columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """The rows at these positions, in this order, piece by piece.

        Args:
            order: positions of rows in the file, each at most once.
            columns: the ones that are wanted; None = all.
        """
        if not len(order):
            return
        cuts = self._cuts(self.num_bytes[order])
        if len(cuts) == 2:
            yield self._of_few(order, columns)
        else:
            yield from self._by_buckets(order, cuts, columns)

    def _cuts(self, num_bytes: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
        """Where the pieces begin, and where the last one ends."""
        ends = np.cumsum(num_bytes, dtype=np.int64)
        cuts = [0]
        while cuts[-1] < len(ends):
            begin = cuts[-1]
            before = ends[begin - 1] if begin else 0
            fits = int(np.searchsorted(ends, before + BYTES_PER_PIECE, side="right"))
            cuts.append(min(max(fits, begin + 1), begin + ROWS_PER_PIECE, len(ends)))
        return np.array(cuts, dtype=np.int64)

    def _of_few(self, order: npt.NDArray[np.int32], columns: Sequence[str] | None) -> pa.Table:
        """Rows that fit in one piece: of each record batch only those are kept."""
        by_row = np.argsort(order, kind="stable")
        rows = order[by_row]
        bounds = np.searchsorted(rows, self._starts)
        kept = []
        for number in np.flatnonzero(np.diff(bounds)):
            inside = rows[bounds[number] : bounds[number + 1]] - self._starts[number]
            kept.append(_select(self.file.read(int(number)), columns).take(pa.array(inside)))
        back = np.empty_like(by_row)
        back[by_row] = np.arange(len(by_row))
        return pa.Table.from_batches(kept).combine_chunks().take(pa.array(back))

    def _by_buckets(
        self, order: npt.NDArray[np.int32], cuts: npt.NDArray[np.int64], columns: Sequence[str] | None
    ) -> Iterator[pa.Table]:
        rank = np.full(len(self.num_bytes), -1, dtype=np.int32)
        rank[order] = np.arange(len(order), dtype=np.int32)
        names = self.file.schema.names if columns is None else list(columns)
        buckets = TableFile(pa.schema([*(self.file.schema.field(name) for name in names), (_RANK, pa.int32())]))
        runs: list[list[int]] = [[] for _ in cuts[1:]]
        for start, table in self._read_in_turn(names):
            ranks = rank[start : start + table.num_rows]
            used = np.flatnonzero(ranks >= 0)
            used = used[np.argsort(ranks[used])]
            if not len(used):
                continue
            ranks = ranks[used]
            ordered = table.take(pa.array(used)).append_column(_RANK, pa.array(ranks)).combine_chunks()
            bounds = np.searchsorted(ranks, cuts)
            for bucket in np.flatnonzero(np.diff(bounds)):
                run = ordered.slice(bounds[bucket], bounds[bucket + 1] - bounds[bucket])
                runs[bucket] += [buckets.append(batch) for batch in run.to_batches()]
        del rank
        buckets.finish()
        for numbers in runs:
            table = pa.Table.from_batches([buckets.read(number) for number in numbers]).combine_chunks()
            by_rank = np.argsort(table[_RANK].to_numpy())
            yield table.drop_columns(_RANK).take(pa.array(by_rank))

    def _read_in_turn(self, columns: Sequence[str]) -> Iterator[tuple[int, pa.Table]]:
        """All rows as they lie in the file, some pieces' worth at a time, each with the position of its first row."""
        held: list[pa.RecordBatch] = []
        start = rows = size = 0
        for number, num_rows in enumerate(self.file.num_rows):
            held.append(_select(self.file.read(number), columns))
            rows, size = rows + num_rows, size + held[-1].nbytes
            if rows >= _READ_AHEAD * ROWS_PER_PIECE or size >= _READ_AHEAD * BYTES_PER_PIECE:
                yield start, pa.Table.from_batches(held).combine_chunks()
                start, held, rows, size = start + rows, [], 0, 0
        if held:
            yield start, pa.Table.from_batches(held).combine_chunks()


def _select(batch: pa.RecordBatch, columns: Sequence[str] | None) -> pa.RecordBatch:
    return batch if columns is None else batch.select(list(columns))
