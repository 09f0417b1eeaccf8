"""A model in a store is fetched once, whole, and by its content; what cannot be had is a sentence."""

import json
import multiprocessing
import shutil
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from moe_families import tiny_model
from s3_server import BUCKET, S3Server

from moe_ray.config.model import ModelConfig
from moe_ray.errors import InputError, OutsideFailed
from moe_ray.models.loading import check_model, load_model
from moe_ray.storage.fetched_folder import CACHE, fetched_folder
from moe_ray.storage.fingerprint import hash_checkpoint


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, of which this process knows nothing."""
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))
    fetched_folder.cache_clear()
    yield tmp_path / "cache"
    fetched_folder.cache_clear()


@pytest.fixture
def store(tmp_path):
    """A folder of a store in this process, and the files that were fetched from it."""
    fs = fsspec.filesystem("memory")
    root = f"/{tmp_path.name}/model"
    for name, data in {"config.json": b"{}", "sub/weights.safetensors": b"1234", "old.bin": b"pickle"}.items():
        fs.pipe_file(f"{root}/{name}", data)
    return fs, f"memory:/{root}"


@pytest.fixture
def fetched(store, monkeypatch):
    names, get_file = [], MemoryFileSystem.get_file
    # Of the class, since fsspec makes an instance for each way of listing.
    monkeypatch.setattr(
        MemoryFileSystem, "get_file", lambda fs, name, target: (names.append(name), get_file(fs, name, target))
    )
    return names


def again(url):
    """As another process of the node asks for it."""
    fetched_folder.cache_clear()
    return fetched_folder(url)


def test_a_folder_is_fetched_once_without_its_pickles(cache, store, fetched):
    folder = fetched_folder(store[1])
    assert folder.parent == cache
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} == {
        "config.json",
        "sub/weights.safetensors",
    }
    assert (folder / "sub/weights.safetensors").read_bytes() == b"1234"
    assert len(fetched) == 2
    assert again(store[1]) == folder
    assert len(fetched) == 2


def test_other_content_is_another_copy(cache, store):
    fs, url = store
    first = fetched_folder(url)
    before = hash_checkpoint(url, "main")
    fs.pipe_file(f"{url.removeprefix('memory:/')}/sub/weights.safetensors", b"12345")
    second = again(url)
    assert second != first
    assert (first / "sub/weights.safetensors").read_bytes() == b"1234"
    changed = hash_checkpoint(url, "main")
    assert {part for part in before if before[part] != changed[part]} == {"model weights"}


def test_one_that_was_not_fetched_whole_is_not_there(cache, store, monkeypatch):
    url = store[1]

    def fails(fs, name, target):
        Path(target).write_bytes(b"part")
        raise ConnectionError("reset by peer")

    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "get_file", fails)
        with pytest.raises(OutsideFailed, match="was not fetched whole: ConnectionError: reset by peer"):
            fetched_folder(url)
    assert [path for path in cache.iterdir() if path.is_dir()] == []
    assert (again(url) / "config.json").is_file()


def test_what_cannot_be_had_is_a_sentence(cache, store, monkeypatch):
    url = store[1]
    with pytest.raises(InputError, match=r"no config\.json"):
        fetched_folder(f"{url}/sub")
    with pytest.raises(InputError, match="'nowhere://bucket/model' cannot be opened"):
        fetched_folder("nowhere://bucket/model")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
        with pytest.raises(InputError, match=f"GB on each node, got 0.0 GB free in .*{CACHE}"):
            fetched_folder(url)
    monkeypatch.setattr(MemoryFileSystem, "find", lambda fs, path, detail: 1 / 0)
    with pytest.raises(OutsideFailed, match="does not answer"):
        again(url)


def fetch(url, folders):
    folders.put(str(fetched_folder(url)))


@pytest.mark.slow
def test_processes_of_a_node_share_a_model_of_s3(cache, tmp_path, monkeypatch):
    model = tiny_model("olmoe")
    model.save_pretrained(tmp_path / "model")
    with S3Server() as server:
        for file in (tmp_path / "model").iterdir():
            server.put(f"models/tiny/{file.name}", file.read_bytes())
        url = f"s3://{BUCKET}/models/tiny"
        context = multiprocessing.get_context("spawn")
        folders = context.Queue()
        processes = [context.Process(target=fetch, args=(url, folders)) for _ in range(2)]
        for process in processes:
            process.start()
        found = {folders.get(timeout=240) for _ in processes}
        for process in processes:
            process.join()
        config = ModelConfig(path=url)
        assert found == {str(config.local_folder())}
        assert [path.name for path in cache.iterdir() if path.is_dir()] == [Path(found.pop()).name]
        assert (
            check_model(config).num_experts == json.loads((tmp_path / "model/config.json").read_text())["num_experts"]
        )
        loaded = load_model(config, device="cpu")
        assert all(
            (mine == other).all()
            for mine, other in zip(loaded.state_dict().values(), model.state_dict().values(), strict=True)
        )
