"""What speaks of a run needs neither torch nor, where nothing is drawn, matplotlib and jinja2."""

from __future__ import annotations

import subprocess
import sys

import pytest
from paths import ROOT

WORDS = (
    "report.ablation_text",
    "report.attack_text",
    "report.before_after",
    "report.certainty_text",
    "report.comparison_text",
    "report.controls_text",
    "report.format",
    "report.harness_text",
    "report.html.attacks",
    "report.html.cause",
    "report.html.examples",
    "report.html.experts",
    "report.html.first_paragraph",
    "report.html.harness",
    "report.html.judge",
    "report.html.headline",
    "report.html.held_out",
    "report.html.how_made",
    "report.html.selected_experts",
    "report.html.shortened",
    "report.html.studies",
    "report.judge_text",
    "report.model_card",
    "report.neutral_text",
    "report.printable",
    "report.run_status",
    "report.run_text",
    "report.runs_text",
    "report.study_text",
    "report.summary",
    "report.terminal",
    "report.truth_text",
    "studies.comparison",
    "studies.heat_map_table",
    "studies.measured",
    "studies.objective",
    "studies.transfer",
)

DRAWING = (
    "report.html.runs",
    "report.html.templates",
    "report.html.comparison_figures",
    "report.html.figures",
    "report.html.page",
    "report.html.run_figures",
    "report.html.svg",
    "studies.heat_map",
)


# A finder, not `sys.modules[name] = None`: scipy looks torch up there, and takes None for a module.
BLOCK = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Block())
"""


def imports(modules, blocked):
    code = f"BLOCKED = {blocked!r}{BLOCK}" + "".join(f"import moe_ray.{name}\n" for name in modules)
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("modules", "blocked"),
    [
        (WORDS, ("torch", "transformers", "ray", "mlflow", "matplotlib", "jinja2")),
        (DRAWING, ("torch", "transformers", "ray", "mlflow")),
    ],
    ids=["words", "drawing"],
)
def test_it_imports_without(modules, blocked):
    done = imports(modules, blocked)
    assert done.returncode == 0, done.stderr


def test_every_module_of_the_report_is_checked():
    found = {
        path.relative_to(ROOT / "moe_ray").with_suffix("").as_posix().replace("/", ".")
        for path in (ROOT / "moe_ray" / "report").rglob("*.py")
        if path.name != "__init__.py"
    }
    assert found == {name for name in (*WORDS, *DRAWING) if name.startswith("report.")}


def test_the_block_works():
    assert "torch is blocked" in imports(["finetuning.trainer"], ["torch"]).stderr
    assert "matplotlib is blocked" in imports(["studies.heat_map"], ["matplotlib"]).stderr
