"""A workflow's start, as a command makes it: Ray is imported after what it reads from the environment is set."""

import os
import subprocess
import sys

import pytest
from paths import ROOT

pytestmark = [pytest.mark.needs_ray]

# The only workflow shows where Ray's server listens. What it would need of prompts and a model is left out.
SHOW_ADDRESS = """
import sys
from types import SimpleNamespace

from moe_ray.config.io import load_config
from moe_ray.orchestration import launch


def show(run):
    import ray

    print("address", ray.get_runtime_context().gcs_address)


sys.modules["moe_ray.orchestration.workflows"] = SimpleNamespace(WORKFLOWS={"show": show})
launch.read_prompts = launch.check_requests = lambda config: None
launch.resolve_model = lambda config, *args, **options: config.model
launch.launch(load_config(overrides=["run_dir=" + sys.argv[1]]), "show")
"""


def test_a_local_ray_listens_on_loopback_only(tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", SHOW_ADDRESS, str(tmp_path / "run")],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "address 127.0.0.1:" in done.stdout, done.stdout + done.stderr
