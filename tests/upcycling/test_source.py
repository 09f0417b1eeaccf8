"""A source that is not there is refused before anything is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_ray.errors import InputError
from moe_ray.upcycling.dense_checkpoint import load_dense
from moe_ray.upcycling.source import existing


@pytest.mark.parametrize("name", ["missing.gguf", "missing.whl", "no/such/folder", "./missing"])
def test_a_missing_file_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="source: nothing at"):
        load_dense(name)


@pytest.mark.parametrize("name", ["model", "owner/model", "owner/model-1.5_b"])
def test_only_what_can_be_a_hub_name_may_have_nothing_there(tmp_path: Path, name: str) -> None:
    assert existing(name) == Path(name)
    with pytest.raises(InputError, match="source: nothing at"):
        existing(tmp_path / name)


def test_a_file_that_is_there_is_taken_whatever_its_name(tmp_path: Path) -> None:
    for name in ("model.gguf", "model.whl", "a b"):
        (tmp_path / name).touch()
        assert existing(tmp_path / name) == tmp_path / name
