"""A source that is not there is refused before anything is loaded."""

from __future__ import annotations

import pytest

from moe_ray.errors import InputError
from moe_ray.upcycling.dense_checkpoint import load_dense


@pytest.mark.parametrize("name", ["missing.gguf", "missing.whl", "no/such/folder", "./missing"])
def test_a_missing_file_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="source: nothing at"):
        load_dense(name)
