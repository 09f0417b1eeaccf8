"""What cannot work is refused before the run directory is touched; what failed outside is said to have failed outside.

Ray is imported after what it reads from the environment is set.
"""

import json
import os
import re
import subprocess
import sys

import pytest
from paths import ROOT

from moe_ray.config.io import load_config
from moe_ray.errors import InputError, OutsideFailed
from moe_ray.orchestration.launch import _storage_failures_named, launch
from moe_ray.storage.folder import Folder


@pytest.fixture
def place(tmp_path):
    """A folder with prompts that can be used."""
    rows = [{"prompt": f"prompt {n}", "label": label} for n in range(40) for label in ("safe", "unsafe")]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


WRONG = {
    "prompts": (["prompts.files=[none.jsonl]"], "'none.jsonl' does not exist"),
    "a split": (["sweep.run=true"], "prompts.validation_fraction"),
    "a threshold": (["identify.threshold=2.5"], "identify.threshold: expected below 2"),
    "a model": (["model.path=./none"], "'./none' is not a checkpoint folder"),
}


@pytest.mark.slow
@pytest.mark.parametrize("is_there", [False, True])
@pytest.mark.parametrize("name", WRONG)
def test_what_is_refused_leaves_the_run_directory_as_it_was(name, is_there, place):
    settings, said = WRONG[name]
    run_dir = place / "run"
    if is_there:
        run_dir.mkdir()
        (run_dir / "config.yaml").write_text("seed: 7\n")
    config = load_config(None, [f"run_dir={run_dir}", f"prompts.files=[{place}/prompts.jsonl]", *settings])
    with pytest.raises(InputError, match=re.escape(said)):
        launch(config, "full")
    left = {path.name: path.read_text() for path in run_dir.iterdir()} if run_dir.exists() else None
    assert left == ({"config.yaml": "seed: 7\n"} if is_there else None)


def test_a_failure_of_remote_storage_is_the_outsides():
    folder = Folder.open("memory://bucket/run")
    with pytest.raises(
        OutsideFailed, match=re.escape(f"{folder.url} failed: no answer; what was done is kept")
    ) as error:
        fail_in(folder, ConnectionError("no answer"))
    assert isinstance(error.value.__cause__, ConnectionError)


@pytest.mark.parametrize(
    ("url", "error"), [("local", OSError("disk full")), ("memory://bucket/run", ValueError("a fault of ours"))]
)
def test_any_other_failure_keeps_its_traceback(url, error, tmp_path):
    folder = Folder.open(str(tmp_path) if url == "local" else url)
    with pytest.raises(type(error)) as raised:
        fail_in(folder, error)
    assert raised.value is error


def fail_in(folder, error):
    with _storage_failures_named(folder):
        raise error


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
launch.read_prompts = lambda config: SimpleNamespace(examples=())
launch.check_requests = launch.refuse_complying_targets = lambda given: None
launch.resolve_model = lambda config, *args, **options: config.model
launch.launch(load_config(overrides=["run_dir=" + sys.argv[1]]), "show")
"""


@pytest.mark.needs_ray
@pytest.mark.own_ray
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
