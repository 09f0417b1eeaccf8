"""Tasks by name: their files, their folders, their versions."""

from __future__ import annotations

import pytest

from moe_ray.config.harness import HarnessConfig
from moe_ray.errors import InputError
from moe_ray.harness import extra, tasks
from moe_ray.harness.tasks import HarnessTask, tasks_of


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    monkeypatch.setattr(tasks, "require", lambda module, what: None)
    monkeypatch.setattr(tasks, "version_of", lambda module: "1.0")


def test_files_are_absolute_and_names_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("own.yaml", "mine.py"):
        (tmp_path / name).write_text("")
    found = tasks_of(HarnessConfig(lm_eval=("hellaswag", "own.yaml"), inspect=("mine.py@second",)))
    assert [task.name for task in found] == ["hellaswag", f"{tmp_path}/own.yaml", f"{tmp_path}/mine.py@second"]
    assert [task.title for task in found] == ["hellaswag", "own", "second"]
    assert len({task.folder for task in found}) == 3


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"harness\.lm_eval: nothing at '/none/own\.yaml'"):
        tasks_of(HarnessConfig(lm_eval=("/none/own.yaml",)))


def test_what_is_beside_a_tasks_file_belongs_to_its_version(tmp_path):
    (tmp_path / "own.yaml").write_text("task: own")
    (tmp_path / "rows.jsonl").write_text("{}")
    task = HarnessTask(harness="lm_eval", name=str(tmp_path / "own.yaml"))
    first = task.version()
    assert first == task.version()
    (tmp_path / "rows.jsonl").write_text("{} ")
    assert task.version() != first
    assert HarnessTask(harness="lm_eval", name="hellaswag").version() == {"package": "1.0"}


def test_an_extra_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(extra, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"harness\.lm_eval needs lm-eval, .* pip install 'moe-ray\[harness\]'"):
        extra.require("lm_eval", "harness.lm_eval")
