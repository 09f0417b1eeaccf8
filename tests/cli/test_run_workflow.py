"""What a user sees who gives the workflow something it cannot work with: one line, at once, and a status."""

import json
import os
import resource
import subprocess
import sys

import pytest
from paths import ROOT
from transformers import LlamaConfig, LlamaForCausalLM

from moe_ray.cli.commands import COMMANDS
from moe_ray.orchestration import workflows
from moe_ray.storage.folder import Folder
from moe_ray.storage.lock import locked


def run_full(*arguments):
    """The finished process and the CPU seconds it took, which other work on the machine does not lengthen."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, str(ROOT / "workflows" / "full.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"prompts.files={path}"


@pytest.fixture(scope="module")
def dense_model(tmp_path_factory):
    path = tmp_path_factory.mktemp("dense")
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def case(name, tmp_path, dense_model):
    return {
        "a wrong key": (["finetune.epoch=3"], "did you mean finetune.epochs"),
        "a missing prompts file": (["prompts.files=none.jsonl"], "'none.jsonl' does not exist"),
        "a missing configuration": (["--config", "none.yaml"], "'none.yaml' does not exist"),
        "one label only": (
            [write(tmp_path / "safe.jsonl", [{"prompt": f"p{n}", "label": "safe"} for n in range(40)])],
            "got 40 safe and 0 unsafe examples",
        ),
        "a model without experts": ([f"model.path={dense_model}"], "no Mixture-of-Experts layer"),
        "a missing model": (["model.path=./none"], "'./none' is not a checkpoint folder"),
        "an address without a scheme": (
            ["tracking.uri=localhost:5000"],
            "expected an address such as http://HOST:5000",
        ),
        "a folder as an address": (["tracking.uri=./mlruns"], "expected an address such as http://HOST:5000"),
        "a password": (["tracking.uri=http://me:secret@host:5000"], "MLFLOW_TRACKING_PASSWORD"),
        "an address that is read only": (["run_dir=http://localhost/run"], "nothing can be written there"),
        "no place for files": (["run_dir=/proc"], "cannot be written to"),
        "a cluster that does not answer": (["cluster.address=127.0.0.1:1"], "no Ray cluster answers at '127.0.0.1:1'"),
    }[name]


@pytest.mark.parametrize(
    ("name", "most_seconds"),
    [
        ("a wrong key", 10),
        ("a missing prompts file", 10),
        ("a missing configuration", 10),
        ("one label only", 10),
        # The model library alone takes 8 of them to import.
        pytest.param("a model without experts", 20, marks=pytest.mark.slow),
        ("a missing model", 10),
        ("an address without a scheme", 10),
        ("a folder as an address", 10),
        ("a password", 10),
        ("an address that is read only", 10),
        pytest.param("no place for files", 20, marks=pytest.mark.slow),
        # Ray takes its seconds to import.
        pytest.param("a cluster that does not answer", 30, marks=pytest.mark.slow),
    ],
)
def test_bad_input_gets_one_clear_error_at_once(name, most_seconds, tmp_path, dense_model):
    arguments, said = case(name, tmp_path, dense_model)
    elsewhere = any(argument.startswith("run_dir=") for argument in arguments)
    done, seconds = run_full(*([] if elsewhere else [f"{tmp_path}/run"]), *arguments)
    assert done.returncode == 2
    *before, line = done.stderr.strip().splitlines()
    # What comes before it are the times at which a run began to do something.
    assert not before or name in ("no place for files", "a cluster that does not answer")
    assert "Traceback" not in done.stderr
    assert line.startswith("error: ")
    assert said in line
    assert "secret" not in line
    assert not (tmp_path / "run").exists() or name == "a cluster that does not answer"
    assert seconds < most_seconds


@pytest.mark.slow
def test_the_second_driver_of_a_run_directory_is_told_so(tmp_path):
    run_dir = tmp_path / "run"
    with locked(Folder.open(str(run_dir))):
        done, _ = run_full(str(run_dir))
    assert done.returncode == 2
    assert f"error: process {os.getpid()} on " in done.stderr
    assert "is at work in" in done.stderr


@pytest.mark.parametrize("name", [name for name, command in COMMANDS.items() if command.work])
def test_the_work_of_a_command_is_a_workflow(name):
    assert callable(workflows.WORKFLOWS[COMMANDS[name].work])
