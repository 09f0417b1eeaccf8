"""Where the time of a run goes: everything once, start-up apart from work, and it adds up to what was waited for."""

import time

import pytest

from moe_ray.orchestration.stages import seconds as account
from moe_ray.orchestration.stages.seconds import START, Seconds, Spent
from moe_ray.storage.folder import Folder
from moe_ray.storage.stage import Outcome


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test sets."""
    now = [100.0]
    monkeypatch.setattr(account.time, "perf_counter", lambda: now[0])
    return now


def outcome(seconds, start=0.0, *, is_reused=False):
    return Outcome(folder=Folder.open("memory://x"), notes={START: start}, seconds=seconds, is_reused=is_reused)


def do(account, name, *outcomes):
    with account.stage(name) as done:
        done.extend(outcomes)


def test_the_parts_add_up_to_the_total(clock):
    seconds = Seconds(97.0)
    with seconds.spent_on("ray", is_start=True):
        clock[0] += 4
    for _ in range(2):
        with seconds.spent_on("tracking"):
            clock[0] += 1
    do(seconds, "capture", outcome(5.0, 2.0))
    clock[0] += 6
    parts = dict(seconds.so_far())
    assert parts["ray"] == Spent(4.0, 4.0)
    assert parts["tracking"] == Spent(2.0, 0.0)
    assert parts["capture"] == Spent(5.0, 2.0)
    assert parts.pop("total") == Spent(15.0, 6.0)
    assert sum(part.total for part in parts.values()) == 15.0
    assert parts["other"].total == 4.0


def test_a_stage_inside_another_ones_work_counts_once(clock):
    seconds = Seconds()
    with seconds.stage("prompts") as done:
        do(seconds, "own_answers/train", outcome(3.0, 2.0))
        do(seconds, "own_answers/test", outcome(30.0, 20.0, is_reused=True))
        done.append(outcome(4.0, 2.0))
    clock[0] += 4
    parts = seconds.so_far()
    assert parts["prompts"] == Spent(1.0, 0.0)
    assert parts["own_answers/train"] == Spent(3.0, 2.0)
    assert parts["total"] == Spent(4.0, 2.0)


def test_what_an_earlier_run_spent_is_told_and_not_counted(clock):
    seconds = Seconds()
    do(seconds, "capture", outcome(50.0, 7.0, is_reused=True))
    clock[0] += 1
    parts = seconds.so_far()
    assert parts["capture"] == Spent(50.0, 7.0, is_reused=True)
    assert parts["total"] == Spent(1.0, 0.0)
    assert parts["other"].total == 1.0


def test_a_part_that_fails_is_counted_and_a_stage_that_fails_is_not(clock):
    seconds = Seconds()

    def fails():
        with seconds.spent_on("report"), seconds.stage("capture"):
            clock[0] += 2
            raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011
        fails()
    assert seconds.so_far()["report"].total == 2.0
    assert "capture" not in seconds.so_far()
    with seconds.stage("identify") as done:
        done.append(outcome(1.0))
    assert seconds.so_far()["identify"].total == 1.0


def test_it_counts_from_now_on_unless_it_is_told_when_the_wait_began():
    began = time.perf_counter()
    assert Seconds().so_far()["total"].total < 5.0
    assert Seconds(began - 100.0).so_far()["total"].total > 100.0
