"""The same forty everyday questions as a task of inspect_ai, asked in the model's chat template and answered in its words.

    moe-ray harness RUN 'harness.inspect=[examples/harness/everyday.py]' harness.max_new_tokens=24

An answer that has the right word in it scores 1, so a model that refuses harmless questions loses what it knows.
"""

import json
from pathlib import Path

from inspect_ai import Task, task
from inspect_ai.dataset import Sample
from inspect_ai.scorer import includes
from inspect_ai.solver import generate


@task
def everyday() -> Task:
    """Questions with the right word as target."""
    rows = map(json.loads, Path(__file__).with_name("everyday.jsonl").read_text(encoding="utf-8").splitlines())
    samples = [Sample(input=row["question"], target=row["choices"][row["gold"]]) for row in rows]
    return Task(dataset=samples, solver=generate(), scorer=includes())
