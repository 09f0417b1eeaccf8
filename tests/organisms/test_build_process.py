"""The embedded model built beside the caller: the same checkpoint, and no process left."""

import multiprocessing
import time

import pytest

from moe_ray.organisms.build import build_embedded
from moe_ray.organisms.build_process import EmbeddedBuild
from moe_ray.organisms.recipe import OrganismRecipe


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.slow
def test_it_gives_what_a_build_in_this_process_gives(tmp_path):
    recipe = OrganismRecipe(num_steps=2)
    with EmbeddedBuild(tmp_path / "beside", seed=1, recipe=recipe) as build:
        here = build_embedded(tmp_path / "here", seed=1, recipe=recipe)
        build.wait()
    assert build.folder.name == here.name
    assert files_of(build.folder) == files_of(here)
    with EmbeddedBuild(tmp_path / "beside", seed=1, recipe=recipe) as again:
        again.wait()
        assert multiprocessing.active_children() == []


@pytest.mark.slow
def test_one_that_nobody_waits_for_any_more_ends_and_leaves_nothing(tmp_path):
    def interrupted_at_work():
        with EmbeddedBuild(tmp_path):
            deadline = time.monotonic() + 60
            while not list(tmp_path.iterdir()):
                assert time.monotonic() < deadline
                time.sleep(0.05)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted_at_work()
    assert multiprocessing.active_children() == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_one_that_fails_says_so(tmp_path, capfd):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(RuntimeError, match="could not be built"), EmbeddedBuild(blocked) as build:
        build.wait()
    assert "Error" in capfd.readouterr().err
