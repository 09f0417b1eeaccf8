"""Tasks of four rows in files, for harnesses that are installed."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

needs_lm_eval = pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is not installed (moe-ray[harness])")
needs_inspect = pytest.mark.skipif(
    find_spec("inspect_ai") is None, reason="inspect-ai is not installed (moe-ray[harness])"
)

_ROWS = [
    ("how are you", "fine", "thanks"),
    ("are you fine", "thanks", "you"),
    ("how", "are", "you"),
    ("you", "how", "fine"),
]

_INSPECT = """
from inspect_ai import Task, task
from inspect_ai.dataset import Sample
from inspect_ai.scorer import includes
from inspect_ai.solver import generate

@task
def four_rows():
    rows = [Sample(input=text, target=answer) for text, answer, _ in ROWS]
    return Task(dataset=rows, solver=generate(), scorer=includes())
"""


def lm_eval_task(folder: Path) -> str:
    """A multiple-choice task over a JSONL file; its YAML file."""
    folder.mkdir(exist_ok=True)
    rows = [{"question": text, "choices": [good, bad], "gold": 0} for text, good, bad in _ROWS]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = {
        "task": "four_rows",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
    }
    # Every JSON value is YAML.
    (folder / "four_rows.yaml").write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in lines.items()))
    return str(folder / "four_rows.yaml")


def inspect_task(folder: Path) -> str:
    """A task of inspect_ai; its Python file."""
    folder.mkdir(exist_ok=True)
    (folder / "four_rows.py").write_text(f"ROWS = {_ROWS!r}\n{_INSPECT}")
    return str(folder / "four_rows.py")
