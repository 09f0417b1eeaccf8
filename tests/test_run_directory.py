"""The run directory: every name once, readers that say which stage is missing, and settings as they were used."""

from __future__ import annotations

import re

import pytest
from paths import ROOT
from run_directory import write_identified, write_repaired, write_swept

from moe_ray import run_directory
from moe_ray.config.run import Config
from moe_ray.errors import InputError
from moe_ray.run_directory import RunDirectory, open_run
from moe_ray.storage.folder import Folder


@pytest.fixture
def run(tmp_path):
    write_identified(Folder.open(str(tmp_path)))
    return open_run(str(tmp_path))


def test_a_place_without_a_run_is_refused_and_not_made(tmp_path):
    with pytest.raises(InputError, match="is not a run directory"):
        open_run(str(tmp_path / "nowhere"))
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("url", ["foo://bar", "foo://", "http://[::1"])
def test_a_url_that_cannot_be_opened_is_the_users_to_mend(url):
    with pytest.raises(InputError, match="cannot be opened"):
        open_run(url)


@pytest.mark.parametrize(
    ("reader", "stage"),
    [
        ("batches", "prepare"),
        ("test", "prepare"),
        ("captured_examples", "capture"),
        ("masks", "identify"),
        ("risk", "identify"),
    ],
)
def test_a_reader_of_what_is_not_there_names_the_stage_to_run(tmp_path, reader, stage):
    directory = RunDirectory.open(str(tmp_path))
    directory.write_config(Config())
    if reader == "captured_examples":
        write_identified(directory.folder)
    with pytest.raises(InputError, match=rf"finished the stage '{stage}' \(moe-ray {stage}\)"):
        getattr(directory, reader)


def test_readers_make_no_folders(run):
    before = set(run.folder.names())
    assert (run.trials, run.comparison, run.history, run.summary, run.validation) == (None,) * 5
    assert run.answers("before") is None
    assert set(run.folder.names()) == before


@pytest.mark.slow
def test_what_was_made_is_read(run):
    write_repaired(run.folder)
    write_swept(run.folder)
    directory = open_run(run.folder.url)
    assert len(directory.masks.batch_idx) == directory.batches["batch_idx"].nunique() == 4
    assert set(directory.categories.values()) == {"fraud", "theft"}
    assert len(directory.history) == 8
    assert len(directory.answers("after")) == 32
    assert len(directory.trials) == 4
    assert directory.counts.counts_NLE.shape[0] == 64


def test_the_settings_of_the_selection_are_those_that_it_was_made_with(run):
    run.write_config(Config())
    directory = open_run(run.folder.url)
    assert directory.config.identify.permutations == Config().identify.permutations
    assert directory.identify_config.permutations == 500


def test_a_run_prints_as_one_line(run):
    assert repr(run) == f"RunDirectory({run.folder.url}, finished: identify)"


def test_no_other_module_spells_a_name_of_the_run_directory():
    names = {
        value
        for name, value in vars(run_directory).items()
        if name.isupper() and isinstance(value, str) and "." in value
    }
    assert {"summary.json", "test.parquet", "config.yaml"} <= names
    spelled = re.compile("|".join(rf"[\"/]{re.escape(name)}\"" for name in names))
    offenders = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in (ROOT / "moe_ray").rglob("*.py")
        if path.name not in ("run_directory.py", "commands.py")  # the latter shows examples of command lines
        for line in path.read_text().splitlines()
        if spelled.search(line) and not re.match(r"[A-Z_, ]+ = ", line)
    ]
    assert offenders == []


def test_no_module_spells_a_folder_where_it_opens_it():
    # MLflow's folders are known to the tracking alone.
    paths = [path for path in (ROOT / "moe_ray").rglob("*.py") if path.parent.name != "tracking"]
    assert [path.name for path in paths if re.search(r"\.sub\(f?\"[a-z]", path.read_text())] == []
