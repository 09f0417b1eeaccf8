import logging
import os
import signal
import subprocess
import sys
import time

import pytest
from paths import ROOT

from moe_ray.orchestration.cluster import raylet_watch
from moe_ray.orchestration.cluster.raylet_watch import ENDED, RayletWatch, raylet_watched
from moe_ray.signals import Terminated, end_on_sigterm

# Waits as a driver does.
WAITS = """
import logging, os, signal, time
logging.basicConfig(level=logging.INFO, format="%(message)s")
from moe_ray.config.cluster import ClusterConfig
from moe_ray.orchestration.cluster.ray_session import ray_session
from moe_ray.orchestration.cluster.raylet_watch import _pid_of_raylet
with ray_session(ClusterConfig(num_cpus=2), dashboard=False):
    import ray
    sleeps = ray.remote(lambda: time.sleep(60)).remote()
    os.kill(_pid_of_raylet(), signal.SIGKILL)
    ray.get(sleeps)
"""


@pytest.fixture
def raylet(monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    end_on_sigterm()
    process = subprocess.Popen(["sleep", "60"])
    monkeypatch.setattr(raylet_watch, "_pid_of_raylet", lambda: process.pid)
    yield process
    process.kill()
    process.wait()
    signal.signal(signal.SIGTERM, before)


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="this system says of no process when it ends")
def test_its_end_is_said_once_and_interrupts_what_is_done(raylet, caplog):
    began = time.monotonic()

    def works():
        os.kill(raylet.pid, signal.SIGKILL)
        time.sleep(30)

    watch = RayletWatch()
    with pytest.raises(Terminated), raylet_watched(watch):
        works()
    assert watch.has_ended
    assert time.monotonic() - began < 10
    assert caplog.messages == [ENDED]
    assert caplog.records[0].levelno == logging.ERROR


def test_an_end_after_the_context_is_nobodys_concern(raylet, caplog):
    watch = RayletWatch()
    with raylet_watched(watch):
        pass
    raylet.kill()
    raylet.wait()
    assert not watch.has_ended
    assert caplog.messages == []


@pytest.mark.parametrize("pid", [0, 2**22 + 1])
def test_what_is_not_there_is_not_watched(pid, monkeypatch, caplog):
    monkeypatch.setattr(raylet_watch, "_pid_of_raylet", lambda: pid)
    with raylet_watched(RayletWatch()):
        pass
    assert caplog.messages == []


@pytest.mark.slow
@pytest.mark.needs_ray
@pytest.mark.own_ray
@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="this system says of no process when it ends")
def test_work_on_a_ray_whose_raylet_is_killed_ends_with_a_sentence_and_soon():
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", WAITS],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        # As in the background of a script.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )
    said = done.stderr.splitlines()
    assert done.returncode == 1  # of Python, which nothing here catches an error for
    assert ENDED in said, done.stderr
    # Where Ray is faster, it has ended the process before there was anything to raise.
    assert said[-1] == ENDED or said[-1].startswith("moe_ray.errors.OutsideFailed: Ray's own process"), done.stderr
