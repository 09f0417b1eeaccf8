"""An adapter's files: the same on every file system, and none of it needs torch."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from moe_ray.errors import InputError
from moe_ray.finetuning.adapter_files import (
    ADAPTER_FILES,
    adapter_digest,
    copy_adapter,
    local_adapter,
    read_adapter_header,
)
from moe_ray.storage.folder import Folder

HEADER = {
    "format": 1,
    "base": "tiny",
    "base_hash": "a",
    "mask_hash": "b",
    "model_type": "olmoe",
    "layers": [0, 2],
    "num_experts": 4,
    "experts": [[0, 1]],
}
WEIGHTS = bytes(range(256)) * 100


@pytest.fixture(params=["local", "memory"])
def folder(request, tmp_path):
    return Folder.open(str(tmp_path / "adapter") if request.param == "local" else f"memory://{tmp_path.name}/adapter")


def write(folder, *, header=HEADER, weights=WEIGHTS):
    folder.write_bytes("experts.safetensors", weights)
    folder.write_bytes("adapter.json", json.dumps(header).encode())
    return folder


def test_the_header_is_read_from_any_file_system(folder):
    assert read_adapter_header(write(folder)) == HEADER


def test_a_copy_has_the_same_files_and_digest(folder, tmp_path):
    source, target = write(folder), Folder.open(str(tmp_path / "copy"))
    copy_adapter(source, target)
    assert target.names() == sorted(ADAPTER_FILES)
    assert all(target.read_bytes(name) == source.read_bytes(name) for name in ADAPTER_FILES)
    assert adapter_digest(target) == adapter_digest(source)


def test_a_copy_replaces_an_older_adapter(folder, tmp_path):
    source, target = write(folder), Folder.open(f"memory://{tmp_path.name}/older")
    write(target, header={**HEADER, "base": "old"}, weights=b"old")
    copy_adapter(source, target)
    assert adapter_digest(target) == adapter_digest(source)


def disk_full(*args):
    raise OSError(28, "disk full")


def test_an_interrupted_copy_leaves_no_finished_adapter(folder, tmp_path, monkeypatch):
    source, target = write(folder), write(Folder.open(str(tmp_path / "older")), weights=b"old")
    monkeypatch.setattr("moe_ray.finetuning.adapter_files.shutil.copyfileobj", disk_full)
    with pytest.raises(OSError, match="disk full"):
        copy_adapter(source, target)
    with pytest.raises(InputError, match="holds no adapter"):
        read_adapter_header(target)


def test_a_local_adapter_is_used_where_it_lies(tmp_path):
    folder = write(Folder.open(str(tmp_path / "adapter")))
    with local_adapter(folder) as path:
        assert path == tmp_path / "adapter"
    assert path.is_dir()


def test_a_remote_adapter_is_copied_for_the_context(tmp_path):
    folder = write(Folder.open(f"memory://{tmp_path.name}/adapter"))
    with local_adapter(folder) as path:
        assert (path / "experts.safetensors").read_bytes() == WEIGHTS
        assert read_adapter_header(path) == HEADER
    assert not path.exists()


@pytest.mark.parametrize(
    "changed",
    [
        {"weights": WEIGHTS[:-1] + b"\0"},
        {"header": {**HEADER, "base": "other"}},
        {"weights": WEIGHTS + b"{"},
    ],
)
def test_the_digest_changes_with_every_byte(folder, changed):
    before = adapter_digest(write(folder))
    assert adapter_digest(write(folder)) == before
    assert adapter_digest(write(folder, **changed)) != before


def enter(folder):
    with local_adapter(folder):
        pass


@pytest.mark.parametrize("use", [read_adapter_header, adapter_digest, enter])
def test_a_folder_without_a_finished_adapter_is_refused(folder, use):
    with pytest.raises(InputError, match="holds no adapter"):
        use(folder)
    write(folder, header={**HEADER, "format": 99})
    with pytest.raises(InputError, match="got adapter format 99, expected one of"):
        use(folder)


@pytest.mark.parametrize("use", [adapter_digest, lambda folder: copy_adapter(folder, Folder.open("memory://copies/c"))])
def test_a_header_without_weights_is_refused(folder, use):
    write(folder).remove("experts.safetensors")
    with pytest.raises(InputError, match=r"without experts\.safetensors"):
        use(folder)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"base": None}, "base is a NoneType"),
        ({"experts": [[0, 4]]}, "L00_E04, which no model of its layout has"),
        ({"experts": [[1, 0]]}, "L01_E00, which no model of its layout has"),
        ({"experts": [[0, 1], [0, 1]]}, "a part twice"),
        ({"experts": [[0]]}, "no whole numbers"),
        ({"experts": [[0, True]]}, "no whole numbers"),
        ({"layers": [0, 10**30]}, "no whole numbers"),
        ({"num_experts": -1}, "num_experts is -1"),
        ({"experts": 3}, "TypeError"),
    ],
)
def test_a_header_that_is_none_is_named(folder, changed, said):
    write(folder, header=HEADER | changed)
    with pytest.raises(InputError, match=rf"adapter\.json is damaged or foreign.*{said}"):
        read_adapter_header(folder)


@pytest.mark.slow
def test_adapter_files_need_no_torch():
    code = "import sys, moe_ray.finetuning.adapter_files; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr
