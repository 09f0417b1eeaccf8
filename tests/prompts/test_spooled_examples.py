"""Examples on disk are those that were written, and what is wrong with them is said as it is of those in memory."""

import gc
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from prompt_examples import example, on_disk, random_examples, write_lines

from moe_ray.errors import InputError
from moe_ray.prompts import contents, shuffle
from moe_ray.prompts.examples import read_examples
from moe_ray.prompts.recognition import read_records
from moe_ray.prompts.spooled_examples import pick, read_spooled


@pytest.mark.parametrize("rows", [3, 1 << 15])
def test_examples_survive_the_disk_in_any_order(monkeypatch, rows):
    monkeypatch.setattr(shuffle, "ROWS_PER_PIECE", rows)
    examples = random_examples(3)
    examples[0] = replace(examples[0], response="r", target="t", target_complete=False)
    stored = on_disk(examples)
    assert list(stored) == examples
    assert [stored[0], stored[-1], *stored[2:5]] == [examples[0], examples[-1], *examples[2:5]]
    order = np.random.default_rng(0).permutation(len(examples)).astype(np.int32)
    for split in (None, "test"):
        assert list(pick(stored, order, split)) == list(pick(examples, order, split))
    with pytest.raises(IndexError):
        stored[len(examples)]


def test_the_digest_is_that_of_the_examples_in_their_order_and_not_of_how_they_were_written(monkeypatch):
    examples = random_examples(5)
    one = on_disk(examples)
    monkeypatch.setattr(contents, "_ROWS_PER_WRITE", 2)
    assert on_disk(examples).digest() == one.digest()
    backwards = np.arange(len(examples), dtype=np.int32)[::-1]
    assert one.pick(backwards).digest() == on_disk(examples[::-1]).digest() != one.digest()
    for change in ({"response": "r"}, {"target": "r"}, {"target_complete": False}, {"category": "z"}, {"pair": "z"}):
        assert on_disk([replace(examples[0], **change), *examples[1:]]).digest() != one.digest()
    assert on_disk([replace(one, split="train") for one in examples]).digest() == one.digest()


@pytest.mark.parametrize("ending", ["jsonl", "json", "parquet"])
def test_files_give_the_examples_of_read_examples(tmp_path, ending):
    rows = [{"id": n, "goal": f"g{n}", "all_prompt": f"a{n}"} for n in range(5)]
    rows += [{"id": 9, "prompt": "p", "label": "safe", "category": "c", "split": "test", "target": "t"}]
    path = write_lines(tmp_path / "p.jsonl", rows)
    if ending == "json":
        path = tmp_path / "p.json"
        path.write_text(json.dumps(rows))
    elif ending == "parquet":
        path = tmp_path / "p.parquet"
        pd.DataFrame(rows).to_parquet(path)
    assert list(read_spooled([read_records([path])])) == read_examples([path])


@pytest.mark.parametrize(
    "rows",
    [
        [{"id": 1, "prompt": "a", "label": "safe"}] * 3,
        [{"prompt": "a"}] * 30,
        [{"prompt": "", "label": "safe"}, *[{"id": "x", "prompt": "a", "label": "safe"}] * 2],
    ],
)
def test_wrong_rows_are_refused_in_the_words_of_read_examples(tmp_path, rows):
    path = write_lines(tmp_path / "p.jsonl", rows)
    said = []
    for read in (lambda: read_examples([path]), lambda: read_spooled([read_records([path])])):
        with pytest.raises(InputError) as error:
            read()
        said.append(str(error.value))
    assert said[0] == said[1]


def test_half_of_a_surrogate_pair_is_named(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a \\ud83d b", "label": "safe"}\n{"prompt": "\\ud83d\\ude00", "label": "safe"}\n')
    with pytest.raises(
        InputError, match=r"1 wrong rows.*\n  .*p\.jsonl:1: record: a text has half of a surrogate pair"
    ):
        read_spooled([read_records([path])])


@pytest.mark.slow
@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_on_the_disk(tmp_path, monkeypatch, fails):
    monkeypatch.setenv("TMPDIR", str(tmp_path / "scratch"))
    monkeypatch.setattr("tempfile.tempdir", None)
    (tmp_path / "scratch").mkdir()
    path = write_lines(tmp_path / "p.jsonl", [{"prompt": "a" * 99, "label": "safe"}] * 50 + [{}] * fails)
    gc.collect()  # what earlier tests left
    open_before = len(os.listdir("/proc/self/fd"))
    if fails:
        with pytest.raises(InputError):
            read_spooled([read_records([path])])
    else:
        examples = read_spooled([read_records([path])])
        assert len(list(examples)) == 50
        assert not list(Path(tmp_path / "scratch").iterdir())
        del examples
    assert not list(Path(tmp_path / "scratch").iterdir())
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == open_before


def test_examples_on_disk_print_as_one_line():
    assert repr(on_disk([example(1, "safe")])) == "SpooledExamples(1 examples)"
