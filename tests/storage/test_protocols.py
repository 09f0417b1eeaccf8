"""Where a package is missing that reads a store, everything that takes a URL says what to install."""

from importlib.util import find_spec

import pytest

from moe_ray.errors import InputError
from moe_ray.repaired import Adapter
from moe_ray.run_directory import open_run
from moe_ray.storage.fetched_folder import fetched_folder
from moe_ray.storage.folder import Folder
from moe_ray.storage.protocols import cure_of


@pytest.mark.skipif(find_spec("gcsfs") is not None, reason="gcsfs is installed, and would call Google")
@pytest.mark.parametrize("opens", [Folder.open, open_run, fetched_folder, Adapter.from_pretrained])
def test_a_store_whose_package_is_missing_names_it_once(opens):
    with pytest.raises(InputError, match=r"'gs://bucket/there' cannot be opened: .*; pip install gcsfs$"):
        opens("gs://bucket/there")


@pytest.mark.parametrize(
    ("error", "url", "cure"),
    [
        (ImportError("no"), "ABFS://a/b", "pip install adlfs"),
        (ImportError("no"), "sftp://a/b", "pip install what the message names"),
        (ValueError("no"), "gs://a/b", "give another"),
    ],
)
def test_the_cure_is_the_package_or_what_the_place_says(error, url, cure):
    assert cure_of(error, url, "give another") == cure
