from typing import ClassVar

import fsspec
import numpy as np
import pandas as pd
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from moe_ray.errors import InputError, OutsideFailed
from moe_ray.routing.count_tables import counts_to_table, table_to_counts
from moe_ray.routing.counts import RoutingCounts
from moe_ray.storage.fingerprint import hash_checkpoint
from moe_ray.storage.folder import Folder


@pytest.fixture(params=["local", "memory"])
def folder(request, tmp_path):
    return Folder.open(str(tmp_path / "run") if request.param == "local" else f"memory://{tmp_path.name}/run")


def some_counts():
    rng = np.random.default_rng(0)
    return RoutingCounts(
        batch_idx=np.array([3, 3]),
        in_batch_idx=np.array([0, 1]),
        label=np.array(["safe", "unsafe"], dtype=object),
        category=np.array(["fraud", "fraud"], dtype=object),
        role=np.array(["prompt", "prompt"], dtype=object),
        num_tokens=np.array([4, 5]),
        counts_NLE=rng.integers(0, 9, (2, 3, 8)).astype(np.int32),
        layers=(1, 2, 5),
        num_experts_per_tok=2,
        pair=np.array(["a", ""], dtype=object),
        weights_NLE=rng.random((2, 3, 8)).astype(np.float32),
    )


def test_routing_counts_survive_a_parquet_file(folder):
    counts = some_counts()
    folder.write_table("counts.parquet", counts_to_table(counts))
    got = table_to_counts(folder.read_table("counts.parquet"))
    assert got.counts_NLE.dtype == np.int32
    assert np.array_equal(got.counts_NLE, counts.counts_NLE)
    assert np.array_equal(got.weights_NLE, counts.weights_NLE)
    assert list(got.pair) == ["a", ""]
    assert (got.layers, got.num_experts_per_tok, list(got.label)) == ((1, 2, 5), 2, ["safe", "unsafe"])


def test_clearing_a_folder_leaves_it_empty(folder):
    folder.write_table("a.parquet", pd.DataFrame({"x": [1]}))
    folder.clear()
    assert folder.names() == []


@pytest.mark.parametrize(
    ("name", "text", "part"),
    [
        ("config.json", "{ }", "model configuration"),
        ("tokenizer.json", "{ }", "tokenizer"),
        ("tokenizer_config.json", '{"chat_template": "a", "eos_token": "b"}', "tokenizer"),
        ("tokenizer_config.json", '{"chat_template": "b"}', "chat template"),
        ("chat_template.jinja", "b", "chat template"),
        ("model.safetensors", "y", "model weights"),
        ("unknown.txt", "", "model configuration"),
    ],
)
def test_a_checkpoints_hash_says_which_part_of_it_changed(tmp_path, name, text, part):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "a"}')
    (tmp_path / "model.safetensors").write_bytes(b"x" * (17 << 20))
    first = hash_checkpoint(str(tmp_path), "main")
    assert hash_checkpoint(str(tmp_path), "main") == first
    (tmp_path / name).write_text(text)
    second = hash_checkpoint(str(tmp_path), "main")
    assert {key for key in first if first[key] != second[key]} == {part}


def test_a_hub_checkpoint_is_its_name_and_revision():
    assert hash_checkpoint("org/model", "v1") == {"model": "org/model", "model revision": "v1"}


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
