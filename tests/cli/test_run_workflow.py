"""What a user sees who gives the workflow something it cannot work with: one line, at once, and a status."""

import importlib.metadata
import json
import re
import resource
import subprocess
import sys
import tomllib

import pytest
from paths import ROOT
from transformers import LlamaConfig, LlamaForCausalLM

from moe_ray.cli import main as console
from moe_ray.cli.main import COMMANDS


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
    ],
)
def test_bad_input_gets_one_clear_error_at_once(name, most_seconds, tmp_path, dense_model):
    arguments, said = case(name, tmp_path, dense_model)
    done, seconds = run_full(f"run_dir={tmp_path}/run", *arguments)
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ")
    assert said in line
    assert not (tmp_path / "run").exists()
    assert seconds < most_seconds


def test_help_explains_every_key_without_loading_a_library():
    done, _ = run_full("--help")
    assert done.returncode == 0
    for key in ("identify.threshold", "finetune.weight_decay", "capture.gpus_per_actor", "tracking.uri"):
        assert f"  {key}  (" in done.stdout
    code = "import sys; import moe_ray.cli.run_workflow; print('torch' in sys.modules or 'ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


def moe_ray(*arguments):
    command = [sys.executable, "-m", "moe_ray", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)


def test_moe_ray_lists_every_command_without_loading_a_library():
    done = moe_ray("--help")
    assert done.returncode == 0
    for name in COMMANDS:
        assert re.search(rf"^  {name} +\S.{{10,}}", done.stdout, re.MULTILINE), name
    code = "import sys; from moe_ray.cli.main import main; main(['--help']); print(sorted(sys.modules))"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True).stdout
    assert not {"'torch'", "'ray'", "'pandas'", "'numpy'", "'yaml'"} & set(re.findall(r"'\w+'", modules))


def test_the_console_entry_point_is_the_function_that_dispatches():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    (entry,) = importlib.metadata.EntryPoints(
        [importlib.metadata.EntryPoint(name, value, "console_scripts") for name, value in scripts.items()]
    )
    assert (entry.name, entry.load()) == ("moe-ray", console.main)


def test_every_workflow_script_has_its_command_and_runs_the_same():
    for path in (ROOT / "workflows").glob("*.py"):
        command = COMMANDS[path.stem.removesuffix("_experts")]
        assert (command.work or command.module) in path.read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["evalute"], "unknown command 'evalute'; did you mean evaluate?"),
        (["zzz"], "unknown command 'zzz'; `moe-ray --help` lists them"),
        ([], "no command"),
        (["full", "finetune.epoch=3"], "did you mean finetune.epochs"),
        (["inspect", "none"], "is not a run directory"),
    ],
)
def test_bad_input_to_moe_ray_gets_one_line_and_status_2(arguments, said, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["moe-ray", *arguments])
    assert console.main(arguments) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    assert said in line


def test_the_help_of_a_command_names_it(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["moe-ray"])
    with pytest.raises(SystemExit) as stopped:
        console.main(["evaluate", "--help"])
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: moe-ray evaluate ")
    assert "  evaluate.max_new_tokens  (" in out


def test_the_version_is_that_of_the_package():
    assert moe_ray("--version").stdout == f"moe-ray {importlib.metadata.version('moe-ray')}\n"
