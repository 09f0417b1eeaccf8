import logging
import os
import signal
import subprocess
import sys
import time

import pytest
from paths import ROOT

from moe_ray.orchestration.cluster import raylet_watch
from moe_ray.orchestration.cluster.raylet_watch import ENDED, raylet_watched

# The next object that is touched ends the process, by Ray's own hand and with status 1.
TOUCHES_OBJECTS = """
import logging, os, signal, sys, time
logging.basicConfig(level=logging.INFO, format="%(message)s")
from moe_ray.config.cluster import ClusterConfig
from moe_ray.orchestration.cluster.ray_session import ray_session
from moe_ray.orchestration.cluster.raylet_watch import _pid_of_raylet
with ray_session(ClusterConfig(num_cpus=2), dashboard=False):
    import ray
    os.kill(_pid_of_raylet(), signal.SIGKILL)
    time.sleep(0.5)
    ray.put(bytes(1 << 20))
"""


@pytest.fixture
def raylet(monkeypatch):
    process = subprocess.Popen(["sleep", "60"])
    monkeypatch.setattr(raylet_watch, "_pid_of_raylet", lambda: process.pid)
    yield process
    process.kill()
    process.wait()


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="this system says of no process when it ends")
def test_its_end_is_said_once_and_at_once(raylet, caplog):
    with raylet_watched():
        os.kill(raylet.pid, signal.SIGKILL)
        deadline = time.monotonic() + 10
        while not caplog.messages and time.monotonic() < deadline:
            time.sleep(0.01)
    assert caplog.messages == [ENDED]
    assert caplog.records[0].levelno == logging.ERROR


def test_an_end_after_the_context_is_nobodys_concern(raylet, caplog):
    with raylet_watched():
        pass
    raylet.kill()
    raylet.wait()
    assert caplog.messages == []


@pytest.mark.parametrize("pid", [0, 2**22 + 1])
def test_what_is_not_there_is_not_watched(pid, monkeypatch, caplog):
    monkeypatch.setattr(raylet_watch, "_pid_of_raylet", lambda: pid)
    with raylet_watched():
        pass
    assert caplog.messages == []


@pytest.mark.slow
@pytest.mark.needs_ray
@pytest.mark.own_ray
@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="this system says of no process when it ends")
def test_a_process_that_ray_ends_has_said_why():
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", TOUCHES_OBJECTS],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 1
    assert ENDED in done.stderr.splitlines(), done.stderr
    assert "Traceback" not in done.stderr
