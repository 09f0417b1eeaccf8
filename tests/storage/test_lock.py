"""A run directory has one driver at a time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
from paths import ROOT

from moe_ray.errors import InputError
from moe_ray.storage import lock
from moe_ray.storage.folder import Folder
from moe_ray.storage.lock import LOCK, locked

HOLDER = """
import sys, time
from moe_ray.storage.folder import Folder
from moe_ray.storage.lock import locked
with locked(Folder.open(sys.argv[1])):
    print("held", flush=True)
    time.sleep(100)
"""


def test_a_second_one_is_told_who_is_there_and_the_place_is_free_afterwards(folder):
    with locked(folder):
        with (
            pytest.raises(InputError, match=rf"process {os.getpid()} on .* is at work in .*give another run_dir"),
            locked(folder),
        ):
            pytest.fail("two at a time")
        assert folder.exists(LOCK)
    assert not folder.exists(LOCK)
    with locked(folder):
        pass


def test_it_is_free_after_an_error(folder):
    with pytest.raises(KeyboardInterrupt), locked(folder):
        raise KeyboardInterrupt
    with locked(folder):
        pass


@pytest.mark.slow
def test_a_killed_process_holds_nothing(tmp_path):
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)}) as holder:
        assert holder.stdout.readline() == b"held\n"
        folder = Folder.open(str(tmp_path))
        with pytest.raises(InputError, match=rf"process {holder.pid} on"), locked(folder):
            pytest.fail("two at a time")
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    with locked(folder):
        pass


def test_where_the_system_knows_no_locks_the_run_goes_on_with_a_warning(tmp_path, monkeypatch, caplog):
    def no_locks(file, how):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", no_locks)
    with locked(Folder.open(str(tmp_path))):
        pass
    assert "cannot be locked" in caplog.text


def test_in_an_object_store_a_driver_without_a_sign_of_life_is_taken_for_dead(tmp_path, monkeypatch):
    folder = Folder.open(f"memory://{tmp_path.name}")
    for left, is_free in (
        ({"host": "h", "pid": 1, "time": time.time()}, False),
        ({"host": "h", "pid": 1, "time": 0}, True),
    ):
        folder.write_json(LOCK, left)
        if is_free:
            with locked(folder):
                pass
        else:
            with pytest.raises(InputError, match="process 1 on h"), locked(folder):
                pytest.fail("two at a time")
    folder.write_bytes(LOCK, b"\xff no json")
    with locked(folder):
        assert folder.read_json(LOCK)["pid"] == os.getpid()


def test_a_sign_of_life_is_given_again_and_again(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "_BEAT_SECONDS", 0.01)
    folder = Folder.open(f"memory://{tmp_path.name}")
    with locked(folder):
        first = folder.read_json(LOCK)["time"]
        deadline = time.monotonic() + 10
        while folder.read_json(LOCK)["time"] == first:
            assert time.monotonic() < deadline
            time.sleep(0.01)


@pytest.mark.slow
def test_in_an_object_store_a_driver_of_this_machine_that_was_killed_holds_nothing(tmp_path):
    folder = Folder.open(f"memory://{tmp_path.name}")
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    left = {"host": "h", "pid": process.pid, "time": time.time(), "system": lock.system_identity()}
    folder.write_json(LOCK, left)
    with pytest.raises(InputError, match=f"process {process.pid} on h"), locked(folder):
        pytest.fail("two at a time")
    process.kill()
    process.wait()
    folder.write_json(LOCK, {**left, "system": "of another machine"})
    with pytest.raises(InputError, match=f"process {process.pid} on h"), locked(folder):
        pytest.fail("its processes are not known here")
    folder.write_json(LOCK, left)
    with locked(folder):
        assert folder.read_json(LOCK)["pid"] == os.getpid()
    process.stdin.close()


def test_a_sign_of_life_that_fails_is_tried_again(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(lock, "_BEAT_SECONDS", 0.01)
    folder = Folder.open(f"memory://{tmp_path.name}")
    with locked(folder):
        first = folder.read_json(LOCK)["time"]
        with monkeypatch.context() as broken:
            broken.setattr(Folder, "write_json", lambda *args: 1 / 0)
            while "could not be renewed" not in caplog.text:
                time.sleep(0.01)
        deadline = time.monotonic() + 10
        while folder.read_json(LOCK)["time"] == first:
            assert time.monotonic() < deadline
            time.sleep(0.01)
