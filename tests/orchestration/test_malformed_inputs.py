"""Malformed inputs end in one clear error, status 2 and no traceback; `malformed_inputs.py` has the cases."""

import pytest
from malformed_inputs import Case, all_cases, faults, tried

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]

OF_A_RUN = ("adapters", "masks", "run folders")
KINDS = ("command lines", "configurations", "model checkpoints", "prompt files", "URLs")


def test_there_are_two_hundred():
    cases = all_cases()
    assert len(cases) >= 200
    assert {case.kind for case in cases} == {*OF_A_RUN, *KINDS}
    assert len({(case.kind, case.what) for case in cases}) == len(cases)


@pytest.mark.parametrize("kind", KINDS)
def test_some_of_each_kind(untrained_model_path, tmp_path, kind):
    assert faults([kind], model=untrained_model_path, run=tmp_path, every=6) == []


@pytest.mark.needs_ray
@pytest.mark.parametrize("kind", OF_A_RUN)
def test_some_that_damage_a_finished_run(finished, tiny_model_path, kind):
    assert faults([kind], model=tiny_model_path, run=finished, every=6) == []


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", KINDS)
def test_all_of_each_kind(untrained_model_path, tmp_path, kind):
    assert faults([kind], model=untrained_model_path, run=tmp_path) == []


@pytest.mark.exhaustive
@pytest.mark.needs_ray
@pytest.mark.parametrize("kind", OF_A_RUN)
def test_all_that_damage_a_finished_run(finished, tiny_model_path, kind):
    assert faults([kind], model=tiny_model_path, run=finished) == []


def test_one_in_a_process_of_its_own(untrained_model_path, tmp_path):
    case = next(case for case in all_cases() if case.what == "deep nesting" and case.kind == "prompt files")
    assert tried(case, model=untrained_model_path, run=tmp_path, apart=True).fault == ""


def test_what_is_no_clear_error_is_told(untrained_model_path, tmp_path):
    taken = Case("command lines", "nothing", lambda place: ["config", "schema"])
    assert tried(taken, model=untrained_model_path, run=tmp_path).fault == "status 0"
