"""Sequences of examples, and of their groups, whose contents are read from the local disk when they are asked for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from typing import overload

import numpy as np
import pyarrow as pa

from moe_ray.prompts.contents import Contents, ContentsWriter
from moe_ray.prompts.example_index import ExampleIndex, IndexBuilder, Positions
from moe_ray.prompts.example_rows import row_to_example
from moe_ray.prompts.example_sources import Record
from moe_ray.prompts.examples import Example, PairedRecords, Split, examples_of_records
from moe_ray.prompts.faults import Faults
from moe_ray.prompts.repeated_ids import RepeatedIds


class SpooledExamples(Sequence[Example]):
    """Some of the examples of a `Contents`, in any order.

    Args:
        contents: of all.
        positions: the examples' positions in it, each at most once; None = all.
        split: the one that they all belong to now; None = as the source says.
    """

    def __init__(self, contents: Contents, positions: Positions | None = None, split: Split | None = None) -> None:
        self.contents, self.split = contents, split
        self.positions = np.arange(len(contents), dtype=np.int32) if positions is None else positions

    def __repr__(self) -> str:
        return f"SpooledExamples({len(self)} examples)"

    def __len__(self) -> int:
        return len(self.positions)

    @overload
    def __getitem__(self, item: int) -> Example: ...
    @overload
    def __getitem__(self, item: slice) -> SpooledExamples: ...
    def __getitem__(self, item: int | slice) -> Example | SpooledExamples:
        if isinstance(item, slice):
            return SpooledExamples(self.contents, self.positions[item], self.split)
        (example,) = SpooledExamples(self.contents, self.positions[[item]], self.split)
        return example

    def __iter__(self) -> Iterator[Example]:
        for table in self.tables():
            for rows in table.to_batches(max_chunksize=1024):
                yield from map(row_to_example, rows.to_pylist())

    def pick(self, positions: Positions, split: Split | None = None) -> SpooledExamples:
        """Those of the examples that stand at these positions."""
        return SpooledExamples(self.contents, self.positions[positions], split or self.split)

    def tables(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """The examples in their order, a row each, as tables of bounded size.

        Args:
            columns: of `EXAMPLE_SCHEMA`; None = all.
        """
        for table in self.contents.tables(self.positions, columns):
            if self.split is not None and "split" in table.column_names:
                place = table.column_names.index("split")
                table = table.set_column(place, "split", pa.repeat(self.split, table.num_rows).cast(pa.string()))
            yield table

    def digest(self) -> str:
        """A short hash of the examples and of their order, whatever split they belong to."""
        return self.contents.digest(self.positions)


def read_spooled(sources: Iterable[Iterable[Record]], *, paired_records: PairedRecords = "pair") -> SpooledExamples:
    """The examples of records, one source after the other, checked and written to the local disk as they are read.

    Args:
        sources: from `read_records`.
        paired_records: as in `read_examples`.

    Raises:
        InputError: a file is missing or unreadable, or rows are wrong.
    """
    faults, ids, writer = Faults(), RepeatedIds(), ContentsWriter()
    for made in examples_of_records(chain.from_iterable(sources), faults, paired_records):
        writer.add(made)
        for example in made:
            ids.add(example.id)
    examples = SpooledExamples(writer.finish())
    faults.add_repeated(example.id for example in examples.pick(ids.repeated()))
    faults.check()
    return examples


def index_of(examples: Sequence[Example]) -> ExampleIndex:
    """The index of examples, wherever they are."""
    if isinstance(examples, SpooledExamples):
        return examples.contents.index.take(examples.positions)
    builder = IndexBuilder()
    builder.add(examples)
    return builder.finish()


def pick(examples: Sequence[Example], positions: Positions, split: Split | None = None) -> Sequence[Example]:
    """Those of the examples that stand at these positions, with their split where one is given."""
    if isinstance(examples, SpooledExamples):
        return examples.pick(positions, split)
    chosen = (examples[position] for position in positions.tolist())
    if split is None:
        return tuple(chosen)
    return tuple(one if one.split == split else replace(one, split=split) for one in chosen)
