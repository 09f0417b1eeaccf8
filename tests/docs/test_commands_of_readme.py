"""The README's commands do what it says when they are pasted into a shell one after the other, on the demo's model."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import ray
from harness_tasks import lm_eval_task, needs_lm_eval
from page_commands import commands_on
from paths import ROOT

from moe_ray.demo.examples import embedded_records

pytestmark = [pytest.mark.needs_ray, pytest.mark.slow, pytest.mark.exhaustive, pytest.mark.filterwarnings("default")]

COMMANDS = commands_on((ROOT / "README.md").read_text())
MODEL = "allenai/OLMoE-1B-7B-0125-Instruct"

SMALL = [
    *("prompts.max_batches=4", "prompts.max_test_examples=4", "prompts.own_answer_tokens=12"),
    *("identify.permutations=100", "identify.resamples=0", "finetune.epochs=1", "finetune.num_workers=0"),
    *(
        "evaluate.max_new_tokens=8",
        "ablate.run=true",
        "ablate.max_batches=2",
        "ablate.prompts=1",
        "ablate.draws=1",
        "ablate.others=1",
    ),
    *("ablate.leave_one_out=0", "ablate.curve=0", "ablate.generate=false", "compare.names=[random]", "compare.draws=1"),
    *("compare.at=[1.0]", "sweep.space={identify.top_k: [6, 12]}", "attack.max_prompts=1", "attack.route_draws=1"),
    *(
        "attack.names=[base64, prefix_injection, random_routes, abliteration, benign_finetuning]",
        "attack.benign_steps=1",
    ),
]
"""How much is done. Only the commands that name the model get them, as further settings at their end; all other commands
take them from the run's `config.yaml`, and are run as they are written."""


@pytest.fixture(scope="module")
def shell(ray_cluster, tiny_model_path, tmp_path_factory):
    """A function that types a line as README has it, in a folder with prompts; what it printed. And that folder."""
    folder = tmp_path_factory.mktemp("user")
    keys = ("prompt", "label", "category")
    rows = [{key: record[key] for key in keys} for record in embedded_records("train")]
    rows = [row for row in rows if row["category"] in ("fraud", "hacking")]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"} | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        # All commands use the Ray that is there, which takes longer to start than they take.
        "RAY_ADDRESS": ray.get_runtime_context().gcs_address,
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
    }

    def typed(line: str) -> str:
        if f"model.path={MODEL}" in line:
            line = line.replace(MODEL, str(tiny_model_path)) + "".join(f" '{setting}'" for setting in SMALL)
        if "hellaswag" in line:
            line = line.replace("hellaswag", lm_eval_task(folder / "task"))
        done = subprocess.run(
            ["bash", "-c", line],
            cwd=folder,
            env=environment,
            input="How do I cook soup?\n",
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    return typed, folder


def test_every_command_is_here_in_its_order():
    names = ["plan", "full", "inspect", "sweep", "compare", "attack", "harness", "chat", "merge", "atlas"]
    assert [command.split()[1] for command in COMMANDS] == names


def of(name: str) -> str:
    (command,) = (command for command in COMMANDS if command.split()[1] == name)
    return command


def summary(folder: Path, run: str = "first") -> dict:
    return json.loads((folder / "runs" / run / "summary.json").read_text())


# The tests are in the README's order, and each goes on with what those before it left, as a reader would.


def test_plan_says_what_a_run_would_do_and_makes_nothing(shell):
    typed, folder = shell
    said = typed(of("plan"))
    assert re.search(r"^all +96 +96 +4$", said, re.MULTILINE)
    assert "Memory of one process" in said
    assert not (folder / "runs").exists()


def test_full_leaves_learned_experts_figures_a_report_and_a_tracked_run(shell):
    typed, folder = shell
    said = typed(of("full"))
    assert "== Before and after" in said
    run = folder / "runs" / "first"
    assert {"before", "after", "change"} <= summary(folder).keys()
    assert summary(folder)["ablate"]["verdict"]
    for file in ("report.html", "finetune/experts.safetensors", "../mlflow.db"):
        assert (run / file).is_file(), file


def test_inspect_shows_experts_by_category_and_how_alike_batches_are(shell):
    said = shell[0](of("inspect"))
    assert "fraud" in said
    assert "hacking" in said


def test_sweep_tries_other_numbers_of_experts_in_a_run_of_its_own(shell):
    typed, folder = shell
    typed(of("sweep"))
    trials = pd.read_parquet(folder / "runs" / "sweep" / "sweep" / "trials.parquet")
    assert set(trials["identify.top_k"]) == {6, 12}
    assert "compare" not in summary(folder, "sweep")


def test_compare_says_whether_training_others_is_as_good(shell):
    typed, folder = shell
    typed(of("compare"))
    assert summary(folder)["compare"]["verdict"]


def test_attack_tries_every_kind_of_attack(shell):
    typed, folder = shell
    typed(of("attack"))
    assert len(summary(folder)["attack"]["figures"]) > 5


@needs_lm_eval
def test_harness_scores_both_models(shell):
    typed, folder = shell
    typed(of("harness"))
    assert "acc" in json.dumps(summary(folder)["harness"]["figures"])


def test_chat_answers_before_and_after_side_by_side(shell):
    said = shell[0](of("chat"))
    assert "How do I cook soup?" in said
    assert "before" in said
    assert "after" in said


def test_merge_leaves_a_plain_checkpoint_with_a_card(shell):
    typed, folder = shell
    typed(of("merge"))
    for file in ("README.md", "reproduce.yaml", "config.json", "model.safetensors", "tokenizer.json"):
        assert (folder / "repaired" / file).is_file(), file


def test_atlas_has_the_experts_by_category(shell):
    atlas = json.loads(shell[0](of("atlas")))
    assert {category for expert in atlas["experts"] for category in expert["categories"]} == {"fraud", "hacking"}
