"""Which pairs a run keeps is found once, piece by piece, with the pairs whole."""

import json
from dataclasses import replace
from itertools import pairwise

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_ray.config.io import load_config
from moe_ray.orchestration.run import Run
from moe_ray.orchestration.stages import pairs
from moe_ray.prompts import shuffle
from moe_ray.prompts.prompt_set import read_prompts
from moe_ray.run_directory import PAIR_OUTCOMES, PAIRS, RunDirectory


@pytest.mark.slow
def test_pairs_are_filtered_once_in_a_run(untrained_model_path, tmp_path):
    """After a sweep the stages before it are asked for again, with prompts from which pairs have been dropped."""
    config = load_config(None, [f"run_dir={tmp_path}/run", "prompts.keep_pairs=jailbroken"])
    run = Run(config, config.model, None, RunDirectory.open(config.run_dir))
    run.outcomes["pairs"] = "the outcome"
    assert pairs.filter_pairs(run) == "the outcome"
    assert pairs.filter_pairs(run.with_config(config)) == "the outcome"


@settings(max_examples=60)
@given(st.lists(st.integers(1, 4), max_size=12), st.lists(st.integers(0, 40), max_size=5))
def test_no_pair_is_cut_in_two(sizes, cuts):
    names = [f"p{number}" for number, size in enumerate(sizes) for _ in range(size)]
    table = pa.table({"pair": pa.array(names, pa.string()), "row": range(len(names))})
    bounds = sorted({0, len(names), *(min(cut, len(names)) for cut in cuts)})
    pieces = [table.slice(begin, end - begin) for begin, end in pairwise(bounds)]
    whole = list(pairs.whole_pairs(pieces))
    assert [row for piece in whole for row in piece["row"].to_pylist()] == list(range(len(names)))
    assert sum(len(set(piece["pair"].to_pylist())) for piece in whole) == len(sizes)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 9, 1 << 15])
def test_the_pairs_that_the_answers_speak_for_are_kept_however_many_are_in_memory(
    untrained_model_path, tmp_path, monkeypatch, rows
):
    """The safe form of every second pair is refused, and the attack of every third; one cannot be asked."""

    def answered(run, frame, parts, what):
        asked.append(len(frame))
        return frame

    def judged(run, answers, parts, what):
        numbers = answers["id"].str.extract(r":(\d+)/")[0].astype(int)
        is_safe = answers["label"] == "safe"
        return answers.assign(refused=(is_safe & (numbers % 2 == 0)) | (~is_safe & (numbers % 3 == 0)))

    asked = []
    monkeypatch.setattr(pairs, "answered", answered)
    monkeypatch.setattr(pairs, "judged", judged)
    monkeypatch.setattr(shuffle, "ROWS_PER_PIECE", rows)
    records = [{"id": n, "goal": f"goal {n}", "all_prompt": f"attack {n}", "category": "c"} for n in range(40)]
    records[4]["all_prompt"] = "word " * 3000
    records += [{"id": f"s{n}", "prompt": "x", "label": "safe"} for n in range(9)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    words = [f"run_dir={tmp_path}/run", f"prompts.files={tmp_path}/p.jsonl", "prompts.keep_pairs=jailbroken"]
    config = load_config(None, [*words, "prompts.safe_per_batch=2", "prompts.unsafe_per_batch=2"])
    model = replace(config.model, path=str(untrained_model_path))
    for _ in range(2):
        run = Run(config, model, read_prompts(config), RunDirectory.open(config.run_dir))
        notes = pairs.filter_pairs(run).notes
        outcomes = run.directory.sub(PAIRS).read_frame(PAIR_OUTCOMES)
        kept = [n for n in range(40) if n % 2 == 0 and n % 3 and n != 4]
        assert outcomes["pair"].tolist() == [f"p:{n}" for n in range(40)]
        assert outcomes.loc[outcomes["kept"], "pair"].tolist() == [f"p:{n}" for n in kept]
        assert (notes["pairs"], notes["kept"], notes["dropped"]["a form cannot be asked"]) == (40, len(kept), 1)
        assert sum(notes["dropped"].values()) == 40 - len(kept)
        left = {example.pair for example in run.prompts.examples}
        assert left == {None, *(f"p:{n}" for n in kept)}
        assert sum(asked) == 78  # the second run reused the first one's answers
