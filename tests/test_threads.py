"""Threads sleep while they wait, and their number is that of the cores which are really there."""

import os
import subprocess
import sys

import pytest
from paths import ROOT

from moe_ray import threads
from moe_ray.threads import (
    PASSIVE,
    WAIT_POLICY,
    threads_of_process,
    usable_cores,
    variables_for_workers,
    wait_passively,
)


@pytest.fixture
def policy(monkeypatch):
    """The environment without a policy, as a user's shell has it."""
    monkeypatch.setattr(threads, "_set_here", False)
    monkeypatch.delenv(WAIT_POLICY, raising=False)
    return monkeypatch


def test_the_policy_is_set_and_workers_get_it_too(policy):
    wait_passively()
    assert os.environ[WAIT_POLICY] == PASSIVE
    assert variables_for_workers() == {WAIT_POLICY: PASSIVE}
    wait_passively()
    assert variables_for_workers() == {WAIT_POLICY: PASSIVE}


def test_what_the_user_says_stays_and_is_not_told_to_a_cluster(policy):
    policy.setenv(WAIT_POLICY, "ACTIVE")
    wait_passively()
    assert os.environ[WAIT_POLICY] == "ACTIVE"
    assert variables_for_workers() == {}


def test_the_command_sets_it_before_torch_is_imported():
    code = f"""
import os, sys
from moe_ray.cli.main import main
assert "torch" not in sys.modules
main(["config", "init", os.devnull + "/nowhere.yaml"])
assert "torch" not in sys.modules
print(os.environ["{WAIT_POLICY}"])
"""
    environment = {name: value for name, value in os.environ.items() if name != WAIT_POLICY}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.stdout.splitlines()[-1:] == [PASSIVE], done.stderr


@pytest.mark.parametrize(("num_processes", "expected"), [(1, 12), (4, 3), (5, 2), (12, 1), (40, 1)])
def test_processes_share_the_cores_and_each_has_one_at_least(num_processes, expected, monkeypatch):
    monkeypatch.setattr(threads, "usable_cores", lambda: 12)
    assert threads_of_process(num_processes) == expected
    assert threads_of_process(num_processes, num_parameters=7_000_000_000) == expected


def test_a_small_model_computes_on_one_thread(monkeypatch):
    monkeypatch.setattr(threads, "usable_cores", lambda: 12)
    assert threads_of_process(1, num_parameters=2_000_000) == 1


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system has no affinity")
def test_cores_that_the_process_may_not_use_do_not_count():
    code = """
import os
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
from moe_ray.threads import usable_cores
print(usable_cores())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.split() == ["1"]
    assert usable_cores() <= len(os.sched_getaffinity(0))
