"""A folder at a local path or any fsspec URL, whose files are written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import fsspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from moe_ray.errors import InputError, OutsideFailed
from moe_ray.storage.damage import check_columns, reading
from moe_ray.storage.protocols import cure_of

_NOTHING_TO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)
_READ_ONLY = {"http", "https", "data", "zip", "tar", "libarchive", "git", "github"}

_OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oss", "oci"}
"""Stores without folders and without a rename, which show an object whole or not at all."""


@dataclass(frozen=True)
class Folder:
    """A folder on any file system that fsspec knows.

    Attributes:
        url: where it is, with the protocol.
        fs: fsspec's file system.
        path: where it is on that file system.
    """

    url: str
    fs: Any = field(repr=False, compare=False)
    path: str = field(repr=False)

    @classmethod
    def open(cls, url: str, *, private: bool = False) -> Folder:
        """The folder at a local path or URL; made if missing.

        Args:
            url: of the folder.
            private: where it is made on a local disk, nobody else may look into it.

        Raises:
            InputError: it cannot be made.
            OutsideFailed: the storage does not answer.
        """
        try:
            # Other processes write here too, and a listing that is kept would not have what they wrote since.
            fs, path = fsspec.url_to_fs(url, use_listings_cache=False)
            protocols = _protocols(fs)
            if _READ_ONLY & protocols:
                raise ValueError("nothing can be written there")
            if _OBJECT_STORES & protocols:
                _check_bucket(fs, path)
            else:
                if private and isinstance(fs, LocalFileSystem) and not fs.exists(path):
                    os.makedirs(os.path.dirname(path), exist_ok=True)
                    os.mkdir(path, 0o700)
                fs.makedirs(path, exist_ok=True)
        except (
            ValueError,
            ImportError,
            PermissionError,
            FileExistsError,
            FileNotFoundError,
            NotADirectoryError,
        ) as error:
            cure = cure_of(error, url, "give a writable folder or URL")
            raise InputError(f"run_dir {url!r} cannot be opened: {error}; {cure}") from error
        except Exception as error:
            if "://" not in url or url.startswith("file://"):
                if not isinstance(error, OSError):
                    raise
                raise InputError(f"run_dir {url!r} cannot be opened: {error}; give a writable folder") from error
            # What a storage's library raises is of its own kind, such as credentials that are missing.
            raise OutsideFailed(f"storage at {url} does not answer: {error}; try again later") from error
        return cls(url=str(fs.unstrip_protocol(path)), fs=fs, path=path)

    def sub(self, name: str) -> Folder:
        """A folder inside, made if missing."""
        path = f"{self.path}/{name}"
        if not self._is_object_store:
            self.fs.makedirs(path, exist_ok=True)
        return Folder(url=f"{self.url}/{name}", fs=self.fs, path=path)

    @property
    def _is_object_store(self) -> bool:
        return bool(_OBJECT_STORES & _protocols(self.fs))

    def file(self, name: str) -> str:
        """The path of a file inside, as messages name it and `fs` takes it."""
        return f"{self.path}/{name}"

    def file_url(self, name: str) -> str:
        """The URL of a file inside."""
        return f"{self.url}/{name}"

    def exists(self, name: str) -> bool:
        """Whether the file is there."""
        return bool(self.fs.exists(self.file(name)))

    def names(self) -> list[str]:
        """Names of the files and folders inside, sorted."""
        try:
            paths = self.fs.ls(self.path, detail=False)
        except FileNotFoundError:  # an object store has no empty folders
            return []
        names = (str(path).rstrip("/") for path in paths)
        # Some stores list a folder among what is inside it.
        return sorted(name.rpartition("/")[2] for name in names if name != self.path.rstrip("/"))

    def files(self) -> list[str]:
        """Paths of all files inside, relative to the folder, sorted."""
        start = len(self.path.rstrip("/")) + 1
        return sorted(str(path)[start:] for path in self.fs.find(self.path))

    def write_bytes(self, name: str, data: bytes) -> None:
        """Writes a file so that readers see all of it or nothing."""
        if self._is_object_store:  # which writes whole objects, and cannot rename them
            self.fs.pipe_file(self.file(name), data)
            return
        temporary = self.file(f".{name}.part")
        try:
            self.fs.pipe_file(temporary, data)
            self.fs.mv(temporary, self.file(name))
        except BaseException:  # such as a full disk, which half a file would keep full
            self.remove(f".{name}.part")
            raise

    def read_bytes(self, name: str) -> bytes:
        """A file's bytes."""
        data: bytes = self.fs.cat_file(self.file(name))
        return data

    def write_json(self, name: str, value: object) -> None:
        """Writes plain values as JSON."""
        self.write_bytes(name, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())

    def read_json(self, name: str) -> Any:
        """What `write_json` wrote.

        Raises:
            InputError: it is damaged.
        """
        data = self.read_bytes(name)
        with reading(self.file(name), expected="JSON"):
            return json.loads(data)

    def remove(self, name: str) -> None:
        """Removes a file if it is there."""
        with contextlib.suppress(FileNotFoundError):
            self.fs.rm_file(self.file(name))

    def write_table(self, name: str, table: pa.Table | pd.DataFrame, *, row_group_size: int | None = None) -> None:
        """Writes a Parquet file in groups of at most `row_group_size` rows; a reader loads whole groups."""
        if isinstance(table, pd.DataFrame):
            table = pa.Table.from_pandas(table, preserve_index=False)
        buffer = io.BytesIO()
        pq.write_table(table, buffer, compression="zstd", row_group_size=row_group_size)
        self.write_bytes(name, buffer.getvalue())

    @contextlib.contextmanager
    def growing_table(
        self, name: str, schema: pa.Schema, *, row_group_size: int
    ) -> Iterator[Callable[[pa.Table], None]]:
        """Gives a function that appends rows to a Parquet file, which readers see when all of them are written.

        Every row group has `row_group_size` rows, but for the last one, however many come at once.
        """
        temporary = self.file(f".{name}.part")
        held = [schema.empty_table()]

        def append(table: pa.Table) -> None:
            rows = pa.concat_tables([*held, table.select(schema.names).cast(schema)])
            whole = rows.num_rows - rows.num_rows % row_group_size
            if whole:
                writer.write_table(rows.slice(0, whole), row_group_size=row_group_size)
            # A copy of its own: a slice would keep all the rows in memory.
            held[:] = [rows.slice(whole).take(pa.array(np.arange(rows.num_rows - whole)))]

        try:
            with self.fs.open(temporary, "wb") as file, pq.ParquetWriter(file, schema, compression="zstd") as writer:
                yield append
                if held[0].num_rows:
                    writer.write_table(held[0])
        except BaseException:
            self.remove(f".{name}.part")
            raise
        self.fs.mv(temporary, self.file(name))

    @contextlib.contextmanager
    def open_parquet(
        self, name: str, *, footer: pq.FileMetaData | None = None, needs: Sequence[str] = ()
    ) -> Iterator[pq.ParquetFile]:
        """An open Parquet file, from which a reader can take some columns or row groups only.

        Args:
            name: of the file.
            footer: its metadata, where they were read before.
            needs: columns that it must have.

        Raises:
            InputError: it is damaged; also where that shows only as its rows are read.
        """
        with self.fs.open(self.file(name), "rb") as file:
            with reading(self.file(name), expected="Parquet"):
                opened = pq.ParquetFile(file, metadata=footer)
            check_columns(self.file(name), opened.schema_arrow.names, needs)
            with (
                opened as parquet,
                reading(self.file(name), expected="the rows that its footer names", only=(pa.ArrowException,)),
            ):
                yield parquet

    def parquet_names(self) -> list[str]:
        """Names of the finished Parquet files inside, sorted."""
        return [name for name in self.names() if name.endswith(".parquet") and not name.startswith(".")]

    def read_table(self, name: str) -> pa.Table:
        """A Parquet file's table.

        Raises:
            InputError: it is damaged.
        """
        data = self.read_bytes(name)
        with reading(self.file(name), expected="Parquet"):
            return pq.read_table(io.BytesIO(data))

    def sync(self) -> None:
        """Has a local disk keep what was written to the folder so far, also if the power fails; elsewhere it is kept."""
        if not isinstance(self.fs, LocalFileSystem):
            return
        for path in [*sorted(self.fs.find(self.path, withdirs=True)), self.path]:
            # A file that somebody has taken away meanwhile need not be kept, and some file systems keep everything at once.
            with contextlib.suppress(FileNotFoundError), _opened(path) as descriptor:
                try:
                    os.fsync(descriptor)
                except OSError as error:
                    if error.errno not in _NOTHING_TO_SYNC:
                        raise

    def read_frame(self, name: str, *, needs: Sequence[str] = ()) -> pd.DataFrame:
        """A Parquet file's rows.

        Args:
            name: of the file.
            needs: columns that it must have.

        Raises:
            InputError: it is damaged, or lacks one of them.
        """
        table = self.read_table(name)
        check_columns(self.file(name), table.column_names, needs)
        with reading(self.file(name), expected="texts and numbers"):
            frame: pd.DataFrame = table.to_pandas()
        return frame

    def delete(self) -> None:
        """Removes the folder with everything inside, if it is there."""
        with contextlib.suppress(FileNotFoundError):
            self.fs.rm(self.path, recursive=True)

    def clear(self, *, keeps: Sequence[str] = ()) -> None:
        """Removes everything inside, except names that match one of the patterns `keeps`, such as `round_*`."""
        if keeps:
            for name in self.names():
                if not any(fnmatch.fnmatchcase(name, pattern) for pattern in keeps):
                    self.fs.rm(self.file(name), recursive=True)
        else:
            self.delete()
        if not self._is_object_store:
            self.fs.makedirs(self.path, exist_ok=True)


@contextlib.contextmanager
def _opened(path: str) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _protocols(fs: Any) -> set[str]:
    return {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)


def _check_bucket(fs: Any, path: str) -> None:
    """Refuses a bucket that is not there; the store's own way to make a folder would make one.

    Raises:
        ValueError: there is none.
    """
    bucket = path.partition("/")[0]
    try:
        found = bool(bucket) and fs.info(bucket)
    except FileNotFoundError:
        found = False
    if not found:
        raise ValueError(f"there is no bucket {bucket!r}")
