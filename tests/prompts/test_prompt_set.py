"""A run's prompts: how many batches and held-out examples are used, and what is refused before a model is loaded."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from prompt_examples import example, many

from moe_ray.config.finetune import FinetuneConfig
from moe_ray.config.prompts import PromptsConfig
from moe_ray.config.run import Config
from moe_ray.demo.examples import embedded_records
from moe_ray.errors import InputError
from moe_ray.prompts.prompt_set import group_examples, read_prompts, without_pairs


def config(**settings):
    return Config(prompts=PromptsConfig(safe_per_batch=2, unsafe_per_batch=2, **settings))


def test_the_first_batches_are_spread_evenly_so_that_categories_stay():
    examples = many(16, 16, "a") + many(16, 16, "b", start=100)
    whole, some = group_examples(examples, config()), group_examples(examples, config(max_batches=2))
    assert {batch.category for batch in some.batches} == {"a", "b"}
    assert all(batch in whole.batches for batch in some.batches)
    used = [item.id for batch in some.batches for item in batch.examples]
    left_over = [item.id for item in some.assembly.left_over]
    train = [item.id for batch in whole.batches for item in batch.examples]
    train += [item.id for item in whole.assembly.left_over]
    assert sorted(used + left_over) == sorted(train)


def test_held_out_examples_are_limited_by_label():
    prompts = group_examples(many(40, 40), config(max_test_examples=3))
    labels = [item.label for item in prompts.test]
    assert (labels.count("safe"), labels.count("unsafe")) == (3, 3)
    assert len(group_examples(many(40, 40), config()).test) == 20
    # More than there are is all of them, each once.
    assert group_examples(many(40, 40), config(max_test_examples=17)).test == (
        tuple(sorted(group_examples(many(40, 40), config()).test, key=lambda item: item.label))
    )


def test_patience_needs_a_validation_split():
    patient = replace(config(), finetune=FinetuneConfig(patience=1))
    with pytest.raises(InputError, match=r"finetune\.patience: needs validation examples"):
        group_examples(many(8, 8), patient)
    split = replace(patient, prompts=replace(patient.prompts, validation_fraction=0.2))
    assert group_examples(many(20, 20), split).validation


def test_prompts_without_some_pairs_are_grouped_anew():
    pairs = [example(n, label, pair=str(n)) for n in range(12) for label in ("safe", "unsafe")]
    prompts = group_examples(pairs, config())
    rest = without_pairs(prompts, np.arange(12) > 2, config())
    assert {item.pair for item in rest.examples} == {str(n) for n in range(3, 12)}
    assert all(len(batch.examples) == 4 for batch in rest.batches)
    with pytest.raises(InputError, match=r"after prompts\.keep_pairs=all dropped 12 pairs"):
        without_pairs(prompts, np.zeros(12, dtype=bool), config())


# What a run does with prompts before a stage works on them, and the pass over the batches in order.
READING = """
import sys
from pathlib import Path

from moe_ray.config.io import load_config
from moe_ray.prompts import shuffle
from moe_ray.prompts.prompt_set import read_prompts

shuffle.ROWS_PER_PIECE = 1024  # so that few examples are many pieces
prompts = read_prompts(load_config(None, [f"prompts.files={sys.argv[1]}"]))
rows = sum(table.num_rows for table in prompts.batches.examples.tables())
assert rows == len(prompts.batches) * 16 > 1000
(peak,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
print(int(peak.split()[1]) * 1024)
"""


@pytest.mark.slow
def test_memory_grows_by_the_index_of_an_example_and_not_by_its_text(tmp_path):
    """Two gigabytes at ten million examples are 200 bytes each; as Python objects they were 3,400."""
    peaks = []
    for number in (20_000, 100_000):
        rows = (f'{{"prompt": "{n} {"word " * 80}", "label": "{("safe", "unsafe")[n % 2]}"}}\n' for n in range(number))
        (tmp_path / "p.jsonl").write_text("".join(rows))
        command = [sys.executable, "-c", READING, str(tmp_path / "p.jsonl")]
        peaks.append(int(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    assert (peaks[1] - peaks[0]) / 80_000 < 300


def test_prompts_that_ship_with_the_package_carry_their_wording_as_template():
    prompts = read_prompts(Config())
    known = {record["id"]: record["wording"] for record in embedded_records("train")}
    train = [one for one in prompts.examples if one.split == "train"]
    assert [one.template for one in train] == [known[one.id.rpartition(":")[2]] for one in train]
    # Labels share wordings, or nothing could be compared within one.
    wordings = {label: {one.template for one in train if one.label == label} for label in ("safe", "unsafe")}
    assert wordings["safe"] == wordings["unsafe"]
