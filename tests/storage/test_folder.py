"""A folder is the same wherever it lies, and one that cannot be written is refused."""

import pandas as pd
import pytest

from moe_ray.errors import InputError
from moe_ray.storage.folder import Folder


def test_clearing_a_folder_leaves_it_empty(folder):
    folder.write_table("a.parquet", pd.DataFrame({"x": [1]}))
    folder.clear()
    assert folder.names() == []


def test_a_run_directory_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="give a writable folder"):
        Folder.open(str(tmp_path / "file" / "run"))
