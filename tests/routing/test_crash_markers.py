"""An example that kills processes is found by what the dead ones wrote."""

import pytest

from moe_ray.routing.crash_markers import MAX_UNEXPLAINED_DEATHS, Attempt
from moe_ray.storage.folder import Folder


@pytest.fixture
def folder(tmp_path):
    return Folder.open(str(tmp_path))


def run_until_it_survives(folder, groups, killers, session="now"):
    """Works on groups of rows as the actor does; a killer ends the attempt. Returns what was given up, and the deaths."""
    for deaths in range(20):
        attempt = Attempt(folder, "w", session)
        rest = [[row for row in group if row not in {*attempt.alone, *attempt.guilty}] for group in groups]
        for group in [*([row] for row in attempt.alone), *rest]:
            attempt.trying(group)
            if set(group) & killers:
                break
        else:
            attempt.finished()
            return attempt.guilty, deaths
    raise AssertionError("never survived")


def test_a_killer_is_found_after_three_deaths_and_its_neighbours_are_kept(folder):
    assert run_until_it_survives(folder, [[0, 1, 2], [3, 4, 5]], {4}) == ([4], 3)
    assert folder.names() == []


def test_several_killers_are_found_one_after_another(folder):
    guilty, _ = run_until_it_survives(folder, [[0, 1, 2], [3, 4, 5]], {1, 2, 4})
    assert sorted(guilty) == [1, 2, 4]


def test_a_process_that_dies_once_accuses_nobody(folder):
    Attempt(folder, "w", "now").trying([0, 1])
    again = Attempt(folder, "w", "now")
    assert (again.is_repeated, again.alone, again.guilty) == (True, [], [])


def test_a_run_that_was_stopped_accuses_nobody(folder):
    Attempt(folder, "w", "before")
    Attempt(folder, "w", "before").trying([7])
    again = Attempt(folder, "w", "now")
    assert (again.is_repeated, again.guilty) == (False, [])


def test_a_window_in_which_processes_die_without_trying_an_example_is_given_up(folder):
    for _ in range(MAX_UNEXPLAINED_DEATHS + 1):
        Attempt(folder, "w", "now")
    with pytest.raises(RuntimeError, match="out of memory"):
        Attempt(folder, "w", "now")
