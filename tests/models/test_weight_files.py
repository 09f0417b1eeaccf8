"""Weights that are missing, damaged or pickles are refused before any is read."""

import json
import pickle

import pytest
import torch
from families import build
from safetensors.torch import save_file

from moe_ray.errors import InputError
from moe_ray.models.weight_files import check_weight_files


@pytest.fixture
def whole(tmp_path):
    build("olmoe").save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def sharded(tmp_path):
    names = {f"w{i}": f"model-0000{i}-of-00003.safetensors" for i in range(1, 4)}
    for tensor, name in names.items():
        save_file({tensor: torch.zeros(4)}, tmp_path / name)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return tmp_path


def test_a_checkpoint_as_transformers_writes_it_is_accepted(whole):
    check_weight_files(whole)


def test_one_in_several_files_is_accepted(sharded):
    check_weight_files(sharded)


@pytest.mark.parametrize("kept", [0, 7, 1000, -1])
def test_a_file_cut_anywhere_is_named(whole, kept):
    path = whole / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(InputError, match=r"model\.safetensors' cannot be read: .*damaged or cut short"):
        check_weight_files(whole)


def test_a_file_that_the_index_names_and_that_is_not_there_is_named(sharded):
    (sharded / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(InputError, match=r"1 of 3 files of weights are missing .*model-00002"):
        check_weight_files(sharded)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"weight_map": 3}', '{"weights": {}}', "\udcff"])
def test_an_index_that_is_none_is_named(sharded, text):
    (sharded / "model.safetensors.index.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(InputError, match="is no index of weights"):
        check_weight_files(sharded)


def test_pickles_are_refused_and_not_opened(tmp_path):
    class Planted:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Planted()))
    with pytest.raises(InputError, match=r"as pickles \(pytorch_model\.bin\)"):
        check_weight_files(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_a_folder_without_weights_is_named(tmp_path):
    with pytest.raises(InputError, match=r"no weights in .*expected model\.safetensors"):
        check_weight_files(tmp_path)
