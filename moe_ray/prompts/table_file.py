"""Tables set aside on the local disk, in a file without a name, which is gone when the process ends in whatever way."""

from __future__ import annotations

import tempfile
import weakref

import pyarrow as pa


class TableFile:
    """Record batches, written one after the other and read by number.

    It lies in the folder for temporary files, which the environment variable `TMPDIR` names.

    Args:
        schema: of every record batch.
    """

    def __init__(self, schema: pa.Schema) -> None:
        self.schema = schema
        self._file = tempfile.TemporaryFile(prefix="moe-ray-")  # noqa: SIM115 – lives as long as this object
        weakref.finalize(self, self._file.close)
        codec = "lz4" if pa.Codec.is_available("lz4") else None
        self._writer = pa.ipc.new_file(self._file, schema, options=pa.ipc.IpcWriteOptions(compression=codec))
        self._reader: pa.ipc.RecordBatchFileReader | None = None
        self.num_rows: list[int] = []
        """Of each record batch."""

    def append(self, batch: pa.RecordBatch) -> int:
        """Writes a record batch; returns its number."""
        self._writer.write_batch(batch)
        self.num_rows.append(batch.num_rows)
        return len(self.num_rows) - 1

    def finish(self) -> None:
        """Nothing is written any more, and everything can be read."""
        self._writer.close()
        self._reader = pa.ipc.open_file(self._file)

    def read(self, number: int) -> pa.RecordBatch:
        """A record batch that was written before `finish`."""
        assert self._reader is not None, "finish() first"
        return self._reader.get_batch(number)
