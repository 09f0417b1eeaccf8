"""Another user of the machine reads nothing of a run, and has no token to submit a job with."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from moe_ray.orchestration.cluster.token_file import protect_token
from moe_ray.run_directory import IDENTIFY, PROMPTS, RunDirectory

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user"),
]
NOBODY = 65534
TRIES = f"""
import os, sys
os.setgroups([])
os.setgid({NOBODY})
os.setuid({NOBODY})
for path in sys.argv[1:]:
    try:
        print("read", len(os.listdir(path) if os.path.isdir(path) else open(path, "rb").read()))
    except PermissionError:
        print("denied")
"""


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home that everybody may enter, as many systems have it."""
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    for folder in (tmp_path, *tmp_path.parents):
        if folder.owner() == "root" and str(folder).startswith("/tmp/"):
            folder.chmod(0o755)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def as_another_user(*paths: Path) -> list[str]:
    """What a process of another user gets of each path."""
    command = [sys.executable, "-I", "-S", "-c", TRIES, *map(str, paths)]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd="/").stdout.split("\n")[:-1]


def test_what_is_open_is_read_by_everybody(home):
    (home / "open.txt").write_text("for all")
    assert as_another_user(home / "open.txt") == ["read 7"]


def test_a_run_directory_is_its_owners_alone(home):
    run = RunDirectory.open(str(home / "runs" / "first"))
    run.sub(PROMPTS).write_json("secret.json", "a prompt")
    run.sub(IDENTIFY).write_json("masks.json", 1)
    paths = [Path(run.folder.path), *(Path(run.folder.path, name) for name in (PROMPTS, f"{PROMPTS}/secret.json"))]
    assert as_another_user(*paths) == ["denied"] * 3


def test_a_run_directory_that_was_there_keeps_its_rights(home):
    (home / "shared").mkdir(mode=0o755)
    RunDirectory.open(str(home / "shared")).folder.write_json("x.json", 1)
    assert as_another_user(home / "shared" / "x.json")[0].startswith("read")


def test_the_token_is_its_owners_alone(home):
    protect_token()
    assert as_another_user(home / ".ray", home / ".ray" / "auth_token") == ["denied"] * 2


ASKS = f"""
import json, os, sys, urllib.error, urllib.request
address, marker, token = sys.argv[1:]
opener = urllib.request.build_opener(urllib.request.ProxyHandler({{}}))

def status(headers, body=None):
    request = urllib.request.Request(address + "/api/jobs/", body, {{"Content-Type": "application/json", **headers}})
    try:
        return opener.open(request, timeout=120).status
    except urllib.error.HTTPError as error:
        return error.code

headers = {{}} if token == "-" else {{"Authorization": "Bearer " + token}}
if token == "-":
    status({{"Authorization": "Bearer none"}})  # what Python imports for a request may lie where only root may read
    os.setgroups([])
    os.setgid({NOBODY})
    os.setuid({NOBODY})
print(status(headers), status(headers, json.dumps({{"entrypoint": "touch " + marker}}).encode()))
"""


@pytest.mark.needs_ray
@pytest.mark.filterwarnings("default")
def test_another_user_submits_no_job_to_a_live_ray(ray_cluster, tmp_path):
    """The dashboard on loopback, which any process of the machine can reach, listens to those alone who have the token."""
    import ray

    address = "http://" + ray._private.worker._global_node.address_info["webui_url"]
    token = (Path.home() / ".ray" / "auth_token").read_text().strip()

    def statuses(marker: Path, token: str) -> list[str]:
        """Of a request for the list of jobs, and of one to run another."""
        command = [sys.executable, "-I", "-S", "-c", ASKS, address, str(marker), token]
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd="/").stdout.split()

    assert set(statuses(tmp_path / "stranger", "-")) <= {"401", "403"}
    assert set(statuses(tmp_path / "wrong", "0" * 64)) <= {"401", "403"}
    listed, submitted = statuses(tmp_path / "owner", token)
    assert listed == "200"
    # Where Ray's agent for jobs is not up within ten seconds, as on a crowded machine, its dashboard answers 500.
    assert submitted in ("200", "500")
    assert not (tmp_path / "stranger").exists()
    assert not (tmp_path / "wrong").exists()
