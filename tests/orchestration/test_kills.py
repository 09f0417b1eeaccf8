"""The real command is killed and goes on; a second one beside it is refused; `tests/kills.py` does so a hundred times."""

import tempfile
from pathlib import Path

import pytest
from kills import KINDS, Kind, Reference, kill_runs, left_of, moment, planned, table

pytestmark = pytest.mark.filterwarnings("default")


class Halfway:
    """Chooses the last of what it may choose, and the middle of it."""

    def choice(self, values):
        return values[-1]

    def random(self):
        return 0.5


def test_a_moment_is_in_a_stage_that_the_kind_names():
    reference = Reference(Path("run"), [("prompts", 10.0), ("capture", 14.0), ("identify", 15.0)], 20.0)
    assert moment(Kind("alone", str, within=("capture",)), reference, Halfway()) == (1, 2.0, "capture")
    assert moment(Kind("alone", str), reference, Halfway()) == (2, 0.5, "identify")


def test_a_moment_comes_soon_in_a_stage_that_a_crowded_machine_made_long():
    reference = Reference(Path("run"), [("prompts", 400.0)], 500.0)
    assert moment(Kind("alone", str), reference, Halfway()) == (0, 10.0, "prompts")


def test_every_kind_comes_as_often_and_a_run_has_kills_of_one_form_only():
    kinds = list(KINDS)
    runs = planned(3 * len(kinds), kinds, per_run=4, seed=1)
    assert sorted(name for _, names in runs for name in names) == sorted(3 * kinds)
    assert all(KINDS[name].form == form for form, names in runs for name in names)
    assert max(len(names) for _, names in runs) == 4
    assert planned(3 * len(kinds), kinds, per_run=4, seed=1) == runs


def test_kills_for_which_a_run_had_no_time_get_another_one():
    done = [{"kind": "driver"}, {"kind": "raylet"}]
    assert left_of("alone", ["raylet", "driver", "SIGINT", "raylet"], done) == [("alone", ["SIGINT", "raylet"])]
    assert left_of("alone", ["driver", "raylet"], done) == []


def test_a_kill_of_a_run_whose_stages_had_all_ended_is_none_that_hit():
    record = {"kind": "SIGINT", "stage": "identify", "at": 3.0, "met": "driver", "resumed": None, "whole": 20.0}
    said = table([{**record, "is_late": late, "faults": []} for late in (True, False)])
    assert said.splitlines()[-1].split()[:4] == ["SIGINT", "2", "1", "2"]


def test_the_table_says_how_many_ended_as_they_should():
    record = {"kind": "driver", "stage": "capture", "at": 3.0, "met": "driver", "resumed": 9.0, "whole": 20.0}
    said = table([{**record, "faults": []}, {**record, "faults": ["masks"], "resumed": None}])
    assert said.splitlines()[-1].split() == ["driver", "2", "2", "1", "1", "20.0", "3.0", "9.0", "9.0"]


@pytest.mark.needs_ray
@pytest.mark.own_ray
@pytest.mark.slow
@pytest.mark.exhaustive
def test_killed_runs_end_as_an_uninterrupted_one(tiny_model_path):
    """Each process once: Ray says nothing of restarts that would fail, nobody is left, and all that was found is equal."""
    kinds = ["model process", "second driver", "driver"]
    assert set(kinds) < set(KINDS)
    # Ray's sockets are below it, whose paths must be shorter than pytest's own temporary folders make them.
    with tempfile.TemporaryDirectory(prefix="kills") as folder:
        records = kill_runs(Path(folder), tiny_model_path, kills=len(kinds), seed=3, kinds=kinds)
    # In the order of their moments, which is another one under each reference.
    assert sorted(record["kind"] for record in records) == sorted(kinds)
    assert [record["faults"] for record in records] == [[]] * len(kinds), table(records)
