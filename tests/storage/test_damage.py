"""A damaged or foreign file ends in one sentence that names it, whatever its reader stumbles over."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from damage import damaged, of_other_types, refusal_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_ray.errors import InputError, OutsideFailed
from moe_ray.finetuning.history import HISTORY, read_history, write_history
from moe_ray.storage.damage import reading
from moe_ray.storage.folder import Folder
from moe_ray.storage.stage import MANIFEST, decide, finish, read_outcome

many = settings(max_examples=100, suppress_health_check=list(HealthCheck), database=None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return Folder.open(str(tmp_path_factory.mktemp("damage")))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished stage."""
    folder = Folder.open(str(tmp_path_factory.mktemp("finished")))
    finish(folder, {"a": 1, "b": [1, 2]}, {"made": {"masks": "abc"}}, seconds=1.5)
    return folder


def sentence_or_fine(path, read):
    """Reading works, since not all damage shows, or ends in a sentence of one line that names the file."""
    said = refusal_of(read)
    assert said is None or (path in said and "\n" not in said and len(said) < 1000)


@pytest.mark.slow
@many
@given(st.data())
def test_json(folder, data):
    folder.write_json("x.json", {"a": [1, 2, {"b": "ü"}], "c": None})
    whole = folder.read_bytes("x.json")
    folder.write_bytes("x.json", data.draw(damaged(whole)))
    sentence_or_fine(folder.file("x.json"), lambda: folder.read_json("x.json"))


@pytest.mark.slow
@many
@given(st.data())
def test_tables(folder, data):
    folder.write_table("x.parquet", pd.DataFrame({"a": np.arange(50), "b": ["text"] * 50}), row_group_size=10)
    whole = folder.read_bytes("x.parquet")
    folder.write_bytes("x.parquet", data.draw(damaged(whole)))
    sentence_or_fine(folder.file("x.parquet"), lambda: folder.read_frame("x.parquet"))

    def read_in_groups():
        with folder.open_parquet("x.parquet") as file:
            for group in range(file.num_row_groups):
                file.read_row_group(group)

    sentence_or_fine(folder.file("x.parquet"), read_in_groups)


@pytest.mark.slow
@many
@given(st.data())
def test_manifests(folder, finished, data):
    whole = finished.read_bytes(MANIFEST)
    folder.write_bytes(MANIFEST, data.draw(st.one_of(damaged(whole), of_other_types(whole))))
    sentence_or_fine(folder.file(MANIFEST), lambda: (decide(folder, {"a": 1}), read_outcome(folder)))


@pytest.mark.slow
@many
@given(st.data())
def test_histories(folder, data):
    write_history(folder, [{"step": 0, "loss": 1.5, "batches": [{"batch_idx": 0}]}, {"step": 1, "loss": 1.0}])
    whole = folder.read_bytes(HISTORY)
    folder.write_bytes(HISTORY, data.draw(damaged(whole)))
    sentence_or_fine(folder.file(HISTORY), lambda: read_history(folder))


def test_a_file_that_is_not_there_is_no_damage(folder):
    with pytest.raises(FileNotFoundError), reading("x", expected="JSON"):
        folder.read_bytes("nothing")


def test_errors_of_ours_and_of_the_disk_stay_what_they_are():
    for error in (
        InputError("x is foreign"),
        OutsideFailed("the outside"),
        PermissionError(13, "denied"),
        OSError(28, "disk full"),
    ):
        with pytest.raises(type(error)) as raised, reading("x", expected="JSON"):
            raise error
        assert raised.value is error


def test_what_is_wrong_with_the_content_is_said_with_the_name_of_the_file():
    with (
        pytest.raises(InputError, match=r"x/masks is damaged or foreign: batch 7 has no expert 20"),
        reading("x/masks", expected="masks"),
    ):
        raise InputError("batch 7 has no expert 20")
    with pytest.raises(InputError, match=r"^not of the file$"), reading("x", expected="JSON", only=(KeyError,)):
        raise InputError("not of the file")


def test_a_long_complaint_is_cut():
    with pytest.raises(InputError) as error, reading("x", expected="JSON"):
        raise ValueError("a line\n" * 1000)
    assert len(str(error.value)) < 400
    assert "\n" not in str(error.value)
