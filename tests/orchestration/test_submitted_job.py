"""`ray job submit` against a running cluster, by the very lines of the documentation, in a clean shell."""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import yaml
from paths import ROOT

pytestmark = [
    pytest.mark.needs_ray,
    pytest.mark.own_ray,
    pytest.mark.slow,
    pytest.mark.exhaustive,
    pytest.mark.filterwarnings("default"),
]

PAGE = (ROOT / "docs" / "cluster.md").read_text()
RAY = str(Path(sys.executable).with_name("ray"))


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def lines():
    """The page's commands for a cluster, joined where they are continued."""
    (block,) = re.findall(r"```\n(.*?)```", PAGE, re.DOTALL)
    return block.replace("\\\n", " ").splitlines()


def typed(line, environment):
    """Runs a line as a shell does; what it said."""
    done = subprocess.run(["bash", "-c", line], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def head(lines, tmp_path_factory):
    """A head node on loopback, started as `cluster.yaml` starts it; yields the environment of a shell that may use it."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "OMP_"))}
    environment |= {
        "HOME": str(tmp_path_factory.mktemp("home")),
        # The servers of a test listen on loopback only.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_num_workers_soft_limit": "8",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    before = lines[: next(number for number, line in enumerate(lines) if line.startswith("ray up"))]
    # What the lines export is found in the shell that typed them.
    exported = typed("; ".join([*(line.partition(" #")[0] for line in before), "env -0"]), environment)
    environment = dict(entry.split("=", 1) for entry in exported.split("\0") if "=" in entry)
    token = Path(environment["HOME"], ".ray", "auth_token")
    assert token.stat().st_mode & 0o077 == 0
    *first, start = yaml.safe_load((ROOT / "cluster.yaml").read_text())["head_start_ray_commands"]
    assert first == ["ray stop", "chmod 700 ~/.ray; chmod 600 ~/.ray/auth_token"]
    # A unix socket's path must be shorter than 107 bytes, which pytest's own temporary folders can exceed.
    with tempfile.TemporaryDirectory(prefix="ray") as folder, open(Path(folder, "log"), "w+b") as log:
        typed(first[1], environment)  # the other one would stop every Ray of the machine
        assert token.parent.stat().st_mode & 0o077 == 0
        for option in ("--port=6379", "--autoscaling-config=~/ray_bootstrap_config.yaml"):
            assert option in start
            start = start.replace(option, "")
        start += f" --block --port=0 --dashboard-port=0 --node-ip-address=127.0.0.1 --num-cpus=4 --temp-dir={folder}"
        # The agent that takes jobs has a fixed port otherwise, which the session's own Ray holds already.
        start += f" --dashboard-agent-listen-port={free_port()}"
        # The start command sets the way of authentication itself: a node has no shell where somebody typed the lines.
        clean = {name: value for name, value in environment.items() if name != "RAY_AUTH_MODE"}
        process = subprocess.Popen(
            ["bash", "-c", f"exec env {start}"], env=clean, stdout=log, stderr=log, start_new_session=True
        )
        try:
            environment["ADDRESS"] = wait_for_dashboard(process, Path(folder, "log"), environment)
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


def submit(head, lines, name, *arguments):
    """Types the page's line with another address and arguments, and a name to ask for the job by."""
    (line,) = (line for line in lines if line.startswith("ray job submit"))
    command, dashes, workflow = line.partition(" -- ")
    assert dashes
    assert "--address http://localhost:8265" in command
    command = command.replace("http://localhost:8265", head["ADDRESS"])
    script = " ".join(workflow.split()[:2])
    assert script == "python workflows/full.py"
    typed_line = f"{command} --submission-id {name} -- {script} {shlex.join(arguments)}"
    return subprocess.run(["bash", "-c", typed_line], cwd=ROOT, env=head, capture_output=True, text=True, timeout=300)


def exit_code(head, name):
    """The job's own exit status, asked for in a process of its own: a token once read is kept for a process's life."""
    client = f"JobSubmissionClient({head['ADDRESS']!r})"
    code = f"from ray.job_submission import *; print({client}.get_job_info({name!r}).driver_exit_code)"
    done = subprocess.run([sys.executable, "-c", code], env=head, capture_output=True, text=True, timeout=60)
    return int(done.stdout)


def test_a_submitted_job_runs_the_whole_workflow(head, lines, tiny_model_path, tmp_path):
    done = submit(
        head,
        lines,
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


def test_a_failing_run_makes_the_job_fail(head, lines, tmp_path):
    done = submit(head, lines, "fails", f"run_dir={tmp_path}/run", "finetune.epoch=1")
    assert done.returncode != 0
    assert "did you mean finetune.epochs" in done.stdout + done.stderr
    assert exit_code(head, "fails") == 2


def test_without_the_token_nobody_is_let_in(head, tmp_path):
    stranger = head | {"HOME": str(tmp_path), "RAY_AUTH_MODE": "token"}
    listed = subprocess.run(
        [RAY, "job", "list", "--address", head["ADDRESS"]], env=stranger, capture_output=True, text=True, timeout=100
    )
    assert listed.returncode != 0
    assert "uthentic" in listed.stdout + listed.stderr
