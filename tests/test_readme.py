import json
import re
from pathlib import Path

import pytest
import torch
from paths import ROOT
from run_directory import write_identified
from transformers import AutoModelForCausalLM

from moe_ray.demo.examples import embedded_records
from moe_ray.storage.folder import Folder

README = (ROOT / "README.md").read_text()
GUIDE = (ROOT / "docs" / "guide.md").read_text()
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()
PYTHON = (ROOT / "docs" / "python.md").read_text()


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_the_python_of_the_documentation_works_as_written(tiny_model_path, tmp_path, monkeypatch, capsys):
    # Threads cost more than these matrices; on a busy machine they cost a hundred times more.
    torch.set_num_threads(1)
    (code,) = re.findall(r"```python\n(.*?)```", PYTHON, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    rows = [record for record in embedded_records("train") if record["category"] == "fraud"]
    Path("prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_identified(Folder.open(str(tmp_path / "run")))
    names = {"path": str(tiny_model_path), "run_dir": str(tmp_path / "run")}
    # The defaults are for real models; a tiny one takes larger steps.
    code = code.replace("progress=True)", "progress=True, learning_rate=3e-3)")
    exec(compile(code, "python.md", "exec"), names)  # our own page
    assert names["tuned"].trainable_parameters > 0
    change = names["after"].change["unsafe_refusal_rate"]
    assert change["value"] > 0.5
    assert f"{names['found']!r}\n" in capsys.readouterr().out
    assert names["run"].masks.trained_batches
    repaired = AutoModelForCausalLM.from_pretrained("repaired").state_dict()
    for name, tensor in names["model"].state_dict().items():
        assert (repaired[name] == tensor).all(), name


@pytest.mark.parametrize("command", ["demo", "demo-real", "test", "test-exhaustive", "check", "docs"])
def test_every_make_command_of_the_readme_exists(command):
    assert f"make {command}" in README
    assert re.search(rf"^{command}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_every_script_of_the_guide_exists_and_the_other_way_round():
    named = set(re.findall(r"^\| `(workflows/\w+\.py)`", GUIDE, re.MULTILINE))
    assert named == {f"workflows/{path.name}" for path in (ROOT / "workflows").glob("*.py")}


def test_every_package_and_module_of_the_top_level_is_in_the_table_of_packages():
    section = ARCHITECTURE.partition("**Package by package**")[2]
    names = {path.name for path in (ROOT / "moe_ray").iterdir() if not path.name.startswith("__")}
    assert {name for name in names if name.endswith(".py") and name not in section} == set()
    assert {name for name in names if "." not in name and f"{name}/" not in section} == set()
