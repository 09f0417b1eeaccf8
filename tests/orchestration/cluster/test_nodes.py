"""Several nodes: one is killed in mid-capture; one does not see the run directory."""

import json
import os
import secrets
import shutil
import subprocess
import sys

import numpy as np
import pytest
from capture_helpers import counts_of_core, write_batches
from paths import ROOT, TESTS

from moe_ray.config.model import ModelConfig
from moe_ray.routing.count_store import read_counts
from moe_ray.storage.folder import Folder

pytestmark = [
    pytest.mark.needs_ray,
    pytest.mark.own_ray,
    pytest.mark.slow,
    pytest.mark.exhaustive,
    pytest.mark.filterwarnings("default"),
]


def can_mount_for_itself():
    if shutil.which("unshare") is None:
        return False
    return subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False).returncode == 0


def drive(*arguments):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_worker_niceness": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
    }
    driver = [sys.executable, str(TESTS / "nodes_driver.py"), *map(str, arguments)]
    done = subprocess.run(driver, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_a_killed_node_loses_and_doubles_nothing(tiny_model_path, tmp_path):
    frame = write_batches(tmp_path / "prompts", 32)
    got = drive("kill", tiny_model_path, tmp_path)
    (killed,) = got["killed"]
    assert killed not in got["alive"]
    assert got["quarantined"] == 0
    counts = read_counts(Folder.open(str(tmp_path / "capture")).sub("counts"))
    expected = counts_of_core(frame, ModelConfig(path=str(tiny_model_path)))
    for name in ("batch_idx", "in_batch_idx", "role", "num_tokens", "counts_NLE"):
        assert np.array_equal(getattr(counts, name), getattr(expected, name)), name


@pytest.mark.skipif(not can_mount_for_itself(), reason="needs the right to mount a file system for one process alone")
def test_a_run_directory_that_one_node_does_not_see_is_refused(tiny_model_path, tmp_path):
    got = drive("reach", tiny_model_path, tmp_path)
    assert got["nodes"] == 3
    assert "cannot be reached from 1 of 3 nodes" in got["message"]
    assert "shared file system" in got["message"]
    assert got["left"] == []
