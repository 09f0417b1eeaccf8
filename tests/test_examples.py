"""Each script of `examples/` runs as a user would run it, on the demo's model."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
import yaml
from harness_tasks import needs_inspect
from paths import ROOT
from transformers import AutoModelForCausalLM

import moe_ray
from moe_ray.demo.examples import embedded_records
from moe_ray.harness.inspect_tasks import task_in_file
from moe_ray.harness.tasks import HarnessTask

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
PYTHON = (ROOT / "docs" / "python.md").read_text()


@pytest.fixture
def prompts(tmp_path):
    """Prompts of one category, so that a script takes seconds."""
    path = tmp_path / "prompts.jsonl"
    rows = [record for record in embedded_records("train") if record["category"] == "fraud"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def run(name: str, *arguments: str, cwd, **variables: str) -> str:
    # Threads cost more than these matrices.
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | variables
    command = [sys.executable, str(ROOT / "examples" / f"{name}.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, check=False, timeout=500)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_experts_of_own_prompts_are_found(tiny_model_path, prompts, tmp_path):
    said = run("find_experts", str(tiny_model_path), prompts, cwd=tmp_path)
    assert re.search(r"^batch 0 \(fraud\): L\d+_E\d+", said, re.MULTILINE)


@pytest.mark.slow
def test_the_cause_is_checked(tiny_model_path, prompts, tmp_path):
    assert "nats a token" in run("causal_check", str(tiny_model_path), prompts, cwd=tmp_path)


@pytest.mark.slow
def test_a_model_is_repaired_and_merged(tiny_model_path, prompts, tmp_path):
    said = run("repair_and_merge", "out", str(tiny_model_path), prompts, cwd=tmp_path)
    losses = [float(loss) for loss in re.findall(r"^epoch \d+: loss ([\d.]+)", said, re.MULTILINE)]
    assert losses == sorted(losses, reverse=True)
    assert len(losses) > 1
    base, repaired = (
        AutoModelForCausalLM.from_pretrained(path).state_dict()
        for path in (tiny_model_path, tmp_path / "out" / "repaired")
    )
    assert base.keys() == repaired.keys()
    assert any((base[name] != repaired[name]).any() for name in base)


@pytest.mark.slow
def test_a_steered_model_answers_otherwise(tiny_model_path, prompts, tmp_path):
    plain, around = (line.split(":", 1)[1].strip() for line in run("steer", str(tiny_model_path), prompts, cwd=tmp_path).splitlines()[-2:])  # fmt: skip # noqa: E501
    assert plain
    assert plain != around


@pytest.mark.slow
def test_the_notebook_runs_as_a_script(tiny_model_path, prompts, tmp_path):
    said = run("notebook", cwd=tmp_path, MODEL=str(tiny_model_path), PROMPTS=prompts)
    before, tuned, after = re.search(r"^(Evaluation.*)\n(FineTuned.*)\n(Evaluation.*)$", said, re.MULTILINE).groups()
    refused = [int(re.search(r"unsafe refused (\d+)%", line)[1]) for line in (before, after)]
    assert refused[1] > refused[0] + 50, tuned
    assert (tmp_path / "notebook" / "risk.png").stat().st_size > 1000
    moe_ray.Adapter.from_pretrained(tmp_path / "notebook" / "adapter")


def test_the_notebook_is_cells_of_text_and_code():
    kinds = re.findall(r"^# %%(.*)$", (ROOT / "examples" / "notebook.py").read_text(), re.MULTILINE)
    assert len(kinds) > 8
    assert set(kinds) == {"", " [markdown]"}


@pytest.mark.slow
def test_settings_are_swept_over_one_capture(tiny_model_path, prompts, tmp_path):
    said = run("sweep", str(tiny_model_path), prompts, cwd=tmp_path).splitlines()
    rows = [line.split() for line in said if re.match(r"\s+0\.\d+\s", line)]
    assert [float(row[0]) for row in rows] == sorted(3 * [0.02, 0.05, 0.1, 0.2])
    unions = [int(row[2]) for row in rows]
    for first in range(0, 12, 3):
        assert unions[first : first + 3] == sorted(unions[first : first + 3])
    assert re.search(r"^top_k=2: [1-9]\d* experts", said[-1])


@pytest.mark.slow
def test_a_judge_of_ones_own_says_what_is_refused(tiny_model_path, prompts, tmp_path):
    said = run("own_judge", str(tiny_model_path), prompts, cwd=tmp_path).splitlines()
    assert [line.partition(":")[0] for line in said[-5:-1]] == ["phrases"] * 2 + ["beginning"] * 2
    assert all(re.search(r"refused \d+% \[\d+%, \d+%\] of \d+$", line) for line in said[-5:-1])
    assert re.fullmatch(r"the two disagree on \d+ of \d+ answers", said[-1])


@pytest.mark.slow
def test_the_planted_experts_of_own_counts_are_found(tmp_path):
    assert {*run("own_counts", cwd=tmp_path).splitlines()[1:]} == {"L01_E05", "L02_E05"}


def test_every_example_is_listed_and_run_here():
    names = {path.stem for path in EXAMPLES}
    assert names == set(re.findall(r"examples/(\w+)\.py", PYTHON))
    tested = set(re.findall(r'run\("(\w+)"', (ROOT / "tests" / "test_examples.py").read_text()))
    assert names == tested


def test_the_everyday_questions_are_forty_with_one_right_answer_each_at_every_place():
    folder = ROOT / "examples" / "harness"
    rows = [json.loads(line) for line in (folder / "everyday.jsonl").read_text().splitlines()]
    assert len({row["question"] for row in rows}) == 40
    assert all(len(set(row["choices"])) == 4 for row in rows)
    assert [sum(row["gold"] == place for row in rows) for place in range(4)] == [10] * 4
    files = yaml.safe_load((folder / "everyday.yaml").read_text())["dataset_kwargs"]["data_files"]
    assert [(ROOT / file).is_file() for file in files.values()] == [True]


@pytest.mark.slow
@needs_inspect
@pytest.mark.filterwarnings("default")
def test_the_everyday_questions_are_a_task_of_inspect_too():
    task = task_in_file(HarnessTask(harness="inspect_ai", name=str(ROOT / "examples" / "harness" / "everyday.py")))
    assert len(task.dataset) == 40
    assert task.dataset[1].target == "spring"
