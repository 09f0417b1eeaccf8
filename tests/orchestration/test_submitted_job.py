"""`ray job submit` against a running cluster, as people use it."""

import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from paths import ROOT

pytestmark = [pytest.mark.needs_ray, pytest.mark.slow, pytest.mark.exhaustive, pytest.mark.filterwarnings("default")]

RAY = str(Path(sys.executable).with_name("ray"))


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def head():
    """A head node on loopback, protected by a token; yields the environment of its clients."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_worker_niceness": "0",
        # The head's servers listen on loopback only.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_num_workers_soft_limit": "8",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    # A unix socket's path must be shorter than 107 bytes, which pytest's own temporary folders can exceed.
    with tempfile.TemporaryDirectory(prefix="ray") as folder, open(Path(folder, "log"), "w+b") as log:
        command = [RAY, "start", "--head", "--block", "--port=0", "--dashboard-host=127.0.0.1", "--dashboard-port=0"]
        command += ["--node-ip-address=127.0.0.1", "--num-cpus=4", "--disable-usage-stats", f"--temp-dir={folder}"]
        # The agent that takes jobs has a fixed port otherwise, which the session's own Ray holds already.
        command += [f"--dashboard-agent-listen-port={free_port()}"]
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            environment["RAY_API_SERVER_ADDRESS"] = wait_for_dashboard(process, Path(folder, "log"), environment)
            yield environment
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def wait_for_dashboard(process, log, environment):
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        found = re.search(r"RAY_API_SERVER_ADDRESS='(http://[\d.:]+)'", log.read_text())
        if found:
            listed = subprocess.run(
                [RAY, "job", "list"],
                env=environment | {"RAY_API_SERVER_ADDRESS": found[1]},
                capture_output=True,
                timeout=280,
            )
            if listed.returncode == 0:
                return found[1]
        time.sleep(0.5)
    raise AssertionError(log.read_text())


def submit(head, name, *arguments):
    command = [RAY, "job", "submit", "--submission-id", name, "--working-dir", "."]
    command += ["--", "python", "workflows/full.py", *arguments]
    return subprocess.run(command, cwd=ROOT, env=head, capture_output=True, text=True, timeout=300)


def exit_code(head, name):
    """The job's own exit status, asked for in a process of its own: a token once read is kept for a process's life."""
    code = f"from ray.job_submission import *; print(JobSubmissionClient().get_job_info({name!r}).driver_exit_code)"
    done = subprocess.run([sys.executable, "-c", code], env=head, capture_output=True, text=True, timeout=60)
    return int(done.stdout)


def test_a_submitted_job_runs_the_whole_workflow(head, tiny_model_path, tmp_path):
    done = submit(
        head,
        "works",
        f"run_dir={tmp_path}/run",
        f"model.path={tiny_model_path}",
        "prompts.max_batches=2",
        "prompts.max_test_examples=4",
        "finetune.epochs=1",
        "finetune.num_workers=0",
        "identify.permutations=200",
        "identify.resamples=0",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["batches"], summary["frozen_parameters_changed"]) == (2, 0)


def test_a_failing_run_makes_the_job_fail(head, tmp_path):
    done = submit(head, "fails", f"run_dir={tmp_path}/run", "finetune.epoch=1")
    assert done.returncode != 0
    assert "did you mean finetune.epochs" in done.stdout + done.stderr
    assert exit_code(head, "fails") == 2
