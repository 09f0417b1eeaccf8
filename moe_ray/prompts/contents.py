"""Examples on the local disk, of which memory holds an index, a digest and a size each."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from moe_ray.prompts.example_index import ExampleIndex, IndexBuilder, Positions
from moe_ray.prompts.example_rows import EXAMPLE_SCHEMA, example_to_row
from moe_ray.prompts.examples import Example
from moe_ray.prompts.shuffle import RowOrder
from moe_ray.prompts.table_file import TableFile

_ROWS_PER_WRITE = 4096
_BYTES_PER_WRITE = 8 << 20
_DIGEST_BYTES = 16
_LARGEST = int(np.iinfo(np.int32).max)


class Contents:
    """Examples as they were added to a `ContentsWriter`.

    Args:
        rows: the examples, with the columns of `EXAMPLE_SCHEMA`.
        index: of them.
        digests: (examples, 16) a hash of each, of everything but its split.
    """

    def __init__(self, rows: RowOrder, index: ExampleIndex, digests: npt.NDArray[np.uint8]) -> None:
        self._rows, self.index, self._digests = rows, index, digests

    def __len__(self) -> int:
        return len(self.index)

    def tables(self, positions: Positions, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """The examples at these positions, in this order, as tables of bounded size.

        Args:
            positions: each at most once.
            columns: of `EXAMPLE_SCHEMA`; None = all.
        """
        return self._rows.pieces(positions, columns)

    def digest(self, positions: Positions) -> str:
        """A short hash of the examples at these positions and of their order."""
        found = hashlib.sha256()
        for start in range(0, len(positions), 1 << 20):
            found.update(self._digests[positions[start : start + (1 << 20)]].tobytes())
        return found.hexdigest()[:16]


class ContentsWriter:
    """Writes examples to the local disk as they come."""

    def __init__(self) -> None:
        self._file, self._index = TableFile(EXAMPLE_SCHEMA), IndexBuilder()
        self._digests, self._num_bytes = bytearray(), array("i")
        self._held: list[dict[str, Any]] = []
        self._held_bytes = 0

    def add(self, examples: Sequence[Example]) -> None:
        """Adds examples; those of a pair must come in the same call.

        Raises:
            UnicodeEncodeError: a text cannot be stored, because it has half of a surrogate pair; nothing was added.
        """
        rows = [example_to_row(example) for example in examples]
        encoded = [_encoded(row) for row in rows]
        self._index.add(examples)
        for text in encoded:
            self._digests += hashlib.blake2b(text, digest_size=_DIGEST_BYTES, usedforsecurity=False).digest()
            self._num_bytes.append(min(len(text), _LARGEST))
            self._held_bytes += len(text)
        self._held += rows
        if len(self._held) >= _ROWS_PER_WRITE or self._held_bytes >= _BYTES_PER_WRITE:
            self._write()

    def finish(self) -> Contents:
        """Everything that was added."""
        self._write()
        self._file.finish()
        rows = RowOrder(self._file, np.frombuffer(self._num_bytes, dtype=np.int32))
        digests = np.frombuffer(self._digests, dtype=np.uint8).reshape(-1, _DIGEST_BYTES)
        return Contents(rows, self._index.finish(), digests)

    def _write(self) -> None:
        if self._held:
            self._file.append(pa.RecordBatch.from_pylist(self._held, schema=EXAMPLE_SCHEMA))
        self._held, self._held_bytes = [], 0


def _encoded(row: dict[str, Any]) -> bytes:
    """Everything of an example but its split, in bytes that no other example has."""
    names = ("id", "label", "category", "messages", "response", "target", "pair", "topic", "template")
    texts = [row[name] for name in names]
    lengths = [-1 if text is None else len(text) for text in texts]
    return f"{lengths}{row['target_complete']:d}{''.join(filter(None, texts))}".encode()
