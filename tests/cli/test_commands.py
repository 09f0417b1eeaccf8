"""Every command answers help and a wrong argument at once, without its libraries, and has its script."""

import ast
import contextlib
import io
import json
import runpy
import shlex
import subprocess
import sys

import pytest
from paths import ROOT

from moe_ray.cli.checks import split_words
from moe_ray.cli.commands import COMMANDS
from moe_ray.cli.main import main
from moe_ray.cli.parser import parse
from moe_ray.config.io import load_config

HEAVY = {"torch", "transformers", "ray", "mlflow", "pandas", "scipy", "numpy", "pyarrow"}

A_WRONG_KEY = (["finetune.epoch=3"], "did you mean finetune.epochs?")
WRONG = {name: A_WRONG_KEY for name, command in COMMANDS.items() if command.work} | {
    "plan": A_WRONG_KEY,
    "report": (["report.example=3"], "did you mean report.examples?"),
    "inspect": (["none"], "is not a run directory"),
    "judge": (["check", "none.csv"], "none.csv"),
    "prompts": (["prompts.label={}"], "did you mean prompts.labels?"),
    "status": (["none"], "is not a run directory"),
    "chat": (["none"], "is not a run directory"),
    "atlas": (["none"], "is not a run directory"),
    "steer": (["model", "none.json"], "is no file"),
    "compare-runs": (["none", "neither"], "is not a run directory"),
    "merge": (["none", "out"], "is not a run directory"),
    "export": (["none", "out"], "is not a run directory"),
    "upcycle": (["none.gguf", "out"], "nothing at none.gguf"),
    "organism": (["hidden", "out"], "choose from 'planted', 'late', 'spread', 'attention'"),
    "config": (["shema"], "choose from 'schema', 'init'"),
}

CODE = """
import contextlib, io, json, sys, time
from moe_ray.cli.main import main

shown = io.StringIO()
with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
    main([sys.argv[1], "--help"])
status = main(sys.argv[1:])
modules = sorted({name.partition(".")[0] for name in sys.modules})
print(json.dumps({"help": shown.getvalue(), "status": status, "seconds": time.process_time(), "modules": modules}))
"""

SCRIPTS = {name: ROOT / "workflows" / f"{'inspect_experts' if name == 'inspect' else name}.py" for name in COMMANDS}
for name in (
    "config",
    "status",
    "compare-runs",
    "chat",
    "steer",
    "judge",
    "atlas",
):  # no work that is submitted to a cluster
    del SCRIPTS[name]


def help_of(name, show):
    """What `show` prints before it ends the process with status 0."""
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), pytest.raises(SystemExit) as stopped:
        show()
    assert stopped.value.code == 0
    assert shown.getvalue().startswith(f"usage: moe-ray {name} "), name
    return shown.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_help_and_a_wrong_argument_take_no_library_and_no_second(name, tmp_path):
    arguments, said = WRONG[name]
    command = [sys.executable, "-c", CODE, name, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path, check=True)
    found = json.loads(done.stdout)
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert said in line
    assert found["status"] == 2
    assert found["help"].startswith(f"usage: moe-ray {name} ")
    assert HEAVY & set(found["modules"]) == set()
    assert found["seconds"] < 1
    assert list(tmp_path.iterdir()) == []


def test_every_command_that_a_cluster_may_run_has_its_script_and_no_other_is_there():
    assert set(SCRIPTS.values()) == set((ROOT / "workflows").glob("*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_says_what_its_command_does_and_gives_the_same_help(name, monkeypatch):
    path = SCRIPTS[name]
    assert ast.get_docstring(ast.parse(path.read_text())).splitlines()[0] == COMMANDS[name].summary
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    script = help_of(name, lambda: runpy.run_path(str(path), run_name="__main__"))
    assert script == help_of(name, lambda: main([name, "--help"]))


def test_a_script_runs_as_a_process_and_ends_with_the_status(tmp_path):
    command = [sys.executable, str(SCRIPTS["full"]), "runs/first", "finetune.epoch=3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "did you mean finetune.epochs?" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_the_examples_of_the_help_are_taken(name):
    shown = help_of(name, lambda: main([name, "--help"]))
    assert COMMANDS[name].examples
    for arguments, _ in COMMANDS[name].examples:
        assert f"moe-ray {name} {arguments}".rstrip() in shown
        parsed = parse([name, *shlex.split(arguments.partition(" > ")[0])])
        if "words" in parsed:
            _, settings = split_words(parsed.words)
            load_config(overrides=settings)
