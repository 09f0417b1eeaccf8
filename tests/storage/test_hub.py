"""Folders pushed to and fetched from a hub on loopback, through huggingface_hub."""

from __future__ import annotations

import pytest
from fake_hub import SHA, TOKEN

from moe_ray.errors import InputError, OutsideFailed
from moe_ray.storage.hub import fetch_folder, make_repository, push_folder


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "folder"
    (folder / "deeper").mkdir(parents=True)
    (folder / "adapter.json").write_text("{}")
    (folder / "deeper" / "weights.safetensors").write_bytes(b"\x00\x01" * 500)
    return folder


@pytest.mark.slow
def test_what_was_pushed_is_fetched_again(hub, folder):
    assert push_folder(folder, "me/repaired", private=True) == f"{hub.url}/me/repaired/commit/{SHA}"
    assert hub.private == {"me/repaired": True}
    assert hub.commits == [("me/repaired", "main", "Upload with moe-ray")]
    fetched = fetch_folder("me/repaired")
    names = ("adapter.json", "deeper/weights.safetensors")
    assert [(fetched / name).read_bytes() for name in names] == [(folder / name).read_bytes() for name in names]


def test_a_second_push_goes_to_the_same_repository_and_to_the_branch_named(hub, folder):
    push_folder(folder, "me/repaired", allow_patterns=["*.json"])
    assert list(hub.files["me/repaired"]) == ["adapter.json"]
    push_folder(folder, "me/repaired", revision="second", commit_message="once more")
    assert hub.commits[1] == ("me/repaired", "second", "once more")
    assert len(hub.files) == 1


def test_an_empty_folder_is_refused_before_the_hub_is_asked(hub, tmp_path):
    with pytest.raises(InputError, match="holds no file to push"):
        push_folder(tmp_path, "me/repaired")
    assert hub.files == {}


@pytest.mark.parametrize(("token", "name", "said"), [("wrong", "me/x", "401"), (TOKEN, "a/b/c", "'user/name'")])
def test_a_wrong_token_or_name_is_the_users_to_mend(hub, folder, token, name, said):
    with pytest.raises(InputError, match=said):
        push_folder(folder, name, token=token)


def test_a_hub_that_is_broken_is_the_outsides_fault(hub, folder):
    hub.fails_with = 507
    with pytest.raises(OutsideFailed, match="507"):
        push_folder(folder, "me/repaired")


def test_a_repository_that_is_not_there_is_the_users_to_mend(hub):
    with pytest.raises(InputError, match="404"):
        fetch_folder("me/nothing")


def test_a_hub_that_cannot_be_reached_is_the_outsides_fault(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(OutsideFailed):
        fetch_folder("me/repaired")
    with pytest.raises(OutsideFailed, match=r"pushing to 'me/repaired': .*try again later"):
        make_repository("me/repaired")


def test_weights_of_an_earlier_model_do_not_stay_beside_those_that_are_pushed(hub, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"whole")
    (tmp_path / "notes.txt").write_text("mine")
    push_folder(tmp_path, "me/model")
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "notes.txt").unlink()
    for name in ("model-00001-of-00001.safetensors", "model.safetensors.index.json"):
        (tmp_path / name).write_bytes(b"sharded")
    push_folder(tmp_path, "me/model")
    pushed = {"model-00001-of-00001.safetensors", "model.safetensors.index.json", "notes.txt"}
    assert hub.files["me/model"].keys() == pushed
