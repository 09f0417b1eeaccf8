import multiprocessing

import pytest
from run_directory import write_identified, write_repaired

from moe_ray.report.run_status import run_status, status_in_words
from moe_ray.run_directory import SUMMARY, open_run
from moe_ray.storage.folder import Folder
from moe_ray.storage.lock import holder, locked
from moe_ray.storage.stage import begin


@pytest.fixture
def folder(tmp_path):
    folder = Folder.open(str(tmp_path / "run"))
    write_identified(folder)
    return folder


def test_finished_stages_and_those_under_way_have_a_row_and_others_none(folder):
    begin(folder.sub("finetune"), {"a": 1})
    rows = run_status(open_run(folder.url)).set_index("stage")
    assert rows.loc["identify", "state"] == "finished"
    assert rows.loc["finetune", "state"] == "not finished"
    assert "sweep" not in rows.index


@pytest.mark.slow
def test_the_training_says_its_last_step(folder):
    write_repaired(folder)
    row = run_status(open_run(folder.url)).set_index("stage").loc["finetune"]
    assert row["so far"].startswith("step ")
    assert "loss" in row["so far"]


def test_nobody_at_work_is_said(folder):
    assert holder(folder) is None
    assert status_in_words(open_run(folder.url)).endswith("goes on where it stopped.")


def test_a_finished_run_is_said_to_be_one_until_something_more_is_begun(folder):
    folder.write_json(SUMMARY, {})
    assert status_in_words(open_run(folder.url)).endswith("all that was begun is finished.")
    begin(folder.sub("finetune"), {"a": 1})
    assert status_in_words(open_run(folder.url)).endswith("goes on where it stopped.")


def hold(url, ready, done):
    with locked(Folder.open(url)):
        ready.set()
        done.wait(60)


@pytest.mark.slow
def test_who_is_at_work_is_said_and_not_disturbed(folder):
    context = multiprocessing.get_context("spawn")
    ready, done = context.Event(), context.Event()
    process = context.Process(target=hold, args=(folder.url, ready, done))
    process.start()
    assert ready.wait(60)
    begin(folder.sub("finetune"), {"a": 1})
    try:
        said = status_in_words(open_run(folder.url))
        rows = run_status(open_run(folder.url)).set_index("stage")
        assert said == f"Process {process.pid} on {holder(folder)['host']} is at work on it."
        assert rows.loc["finetune", "state"] == "under way"
    finally:
        done.set()
        process.join(60)
    assert process.exitcode == 0
    assert holder(folder) is None
