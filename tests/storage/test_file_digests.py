"""A file that is lost or changed is noticed, on a disk by its bytes and in an object store by its tag."""

import pytest

from moe_ray.storage.file_digests import changed_files, file_digests
from moe_ray.storage.folder import Folder


def test_every_change_is_noticed(folder):
    for name in "abcd":
        folder.write_bytes(name, name.encode() * 1000)
    digests = file_digests(folder, "abcd")
    assert changed_files(folder, digests) == []
    folder.write_bytes("b", b"b" * 999 + b"x")
    folder.write_bytes("c", b"c" * 999)
    folder.remove("d")
    assert changed_files(folder, digests) == ["b", "c", "d"]


def test_equal_files_have_equal_digests_and_one_that_is_not_there_has_none(folder):
    folder.write_bytes("a", b"same")
    folder.write_bytes("b", b"same")
    assert file_digests(folder, ["a", "b", "c"]) == dict.fromkeys("ab", file_digests(folder, ["a"])["a"])


def test_of_a_store_that_has_tags_nothing_is_read(tmp_path, monkeypatch):
    folder = Folder.open(f"memory://{tmp_path.name}/tagged")
    folder.write_bytes("a", b"1")
    tags = {"a": '"one"'}

    def info(path, **options):
        return {"name": path, "ETag": tags[path.rpartition("/")[2]]}

    monkeypatch.setattr(folder.fs, "info", info)
    monkeypatch.setattr(folder.fs, "open", lambda *args, **options: pytest.fail("read"))
    digests = file_digests(folder, ["a"])
    assert digests == {"a": "tag one"}
    tags["a"] = '"two"'
    assert changed_files(folder, digests) == ["a"]
