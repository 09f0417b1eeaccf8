"""A folder is the same wherever it lies, and one that cannot be written is refused."""

import errno
from typing import ClassVar

import fsspec
import pandas as pd
import pyarrow as pa
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from moe_ray.errors import InputError, OutsideFailed
from moe_ray.storage.folder import Folder


def test_clearing_a_folder_leaves_it_empty(folder):
    folder.write_table("a.parquet", pd.DataFrame({"x": [1]}))
    folder.clear()
    assert folder.names() == []


def test_a_run_directory_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="give a writable folder"):
        Folder.open(str(tmp_path / "file" / "run"))


class DeadStorage(MemoryFileSystem):
    """Storage that does not answer."""

    protocol = "dead"

    def makedirs(self, path, exist_ok=False):
        raise OSError("connection refused")


class StorageWithoutFolders(MemoryFileSystem):
    """As an object store: a folder is there while something is in it, and what is not there cannot be listed or removed."""

    protocol = "objects"
    store: ClassVar[dict] = {}
    pseudo_dirs: ClassVar[list] = []

    def makedirs(self, path, exist_ok=False):
        pass


@pytest.fixture
def storages():
    for storage in (DeadStorage, StorageWithoutFolders):
        fsspec.register_implementation(storage.protocol, storage, clobber=True)


def test_storage_that_does_not_answer_is_not_the_users_to_mend(storages):
    with pytest.raises(OutsideFailed, match="storage at dead://run does not answer: connection refused; try again"):
        Folder.open("dead://run")


def test_a_store_without_folders_is_a_run_directory_too(storages):
    folder = Folder.open("objects://bucket/run")
    assert folder.names() == []
    folder.clear()
    folder.write_json("a.json", 1)
    folder.sub("round_1").write_json("b.json", 2)
    assert folder.names() == ["a.json", "round_1"]
    folder.clear(keeps=("round_*",))
    assert folder.names() == ["round_1"]
    folder.delete()
    assert folder.names() == []
    folder.delete()


SCHEMA = pa.schema([("x", pa.int64()), ("text", pa.string())])


@pytest.mark.parametrize("sizes", [[], [0], [5, 1, 0, 13, 4], [4, 4], [30]])
def test_a_growing_table_has_whole_row_groups_however_its_rows_come(folder, sizes):
    rows = pa.table({"x": range(sum(sizes)), "text": pa.nulls(sum(sizes))})
    with folder.growing_table("a.parquet", SCHEMA, row_group_size=4) as append:
        start = 0
        for size in sizes:
            append(rows.slice(start, size))
            start += size
            assert not folder.exists("a.parquet")
    assert folder.read_table("a.parquet").equals(rows.cast(SCHEMA))
    with folder.open_parquet("a.parquet") as file:
        groups = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    assert groups == [4] * (sum(sizes) // 4) + [sum(sizes) % 4] * (sum(sizes) % 4 > 0)


def test_a_growing_table_that_fails_leaves_the_old_file_and_nothing_else(folder):
    folder.write_table("a.parquet", pd.DataFrame({"x": [1]}))

    def fail():
        with folder.growing_table("a.parquet", SCHEMA, row_group_size=4) as append:
            append(pa.table({"x": range(9), "text": pa.nulls(9)}))
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert folder.read_frame("a.parquet")["x"].tolist() == [1]
    assert folder.names() == ["a.parquet"]


def test_a_file_that_cannot_be_written_to_its_end_leaves_nothing_behind(tmp_path, monkeypatch):
    folder = Folder.open(str(tmp_path))
    folder.write_bytes("a.json", b"old")

    def fills_the_disk(path, data):
        with open(path, "wb") as file:
            file.write(data[:1])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(folder.fs, "pipe_file", fills_the_disk)
    with pytest.raises(OSError, match="No space left"):
        folder.write_bytes("a.json", b"new")
    assert folder.names() == ["a.json"]
    assert folder.read_bytes("a.json") == b"old"
