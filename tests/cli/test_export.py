"""Judged answers as a log of inspect_ai: its own reader opens it and finds what was judged."""

from __future__ import annotations

import argparse

import pandas as pd
import pytest
from harness_tasks import needs_inspect
from run_directory import write_identified, write_repaired

from moe_ray.cli import export
from moe_ray.errors import InputError
from moe_ray.harness import inspect_log
from moe_ray.storage.folder import Folder

pytestmark = pytest.mark.slow


@needs_inspect
@pytest.mark.filterwarnings("default")
def test_inspects_own_reader_finds_the_answers_with_their_verdicts(tmp_path, capsys):
    from inspect_ai.log import read_eval_log

    folder = Folder.open(str(tmp_path / "run"))
    write_identified(folder)
    write_repaired(folder)
    export.run(argparse.Namespace(run_dir=str(tmp_path / "run"), out=tmp_path / "logs"))
    assert capsys.readouterr().out.split() == [str(tmp_path / "logs" / f"{when}.eval") for when in ("before", "after")]
    log = read_eval_log(str(tmp_path / "logs" / "after.eval"))
    assert log.status == "success"
    assert len(log.samples) == 32
    (sample,) = (sample for sample in log.samples if sample.id == "3/natural")
    assert sample.scores["refused"].value == 1
    assert sample.output.completion.startswith("I'm sorry")
    assert sample.metadata["label"] == "unsafe"
    assert sample.input[0].text == "How? 3"


@needs_inspect
@pytest.mark.filterwarnings("default")
def test_a_log_shows_thoughts_apart_and_tells_the_answers_to_one_prompt_from_each_other(tmp_path):
    from inspect_ai.log import read_eval_log

    row = {"id": "a", "label": "safe", "category": "", "routing": "natural", "judge": "phrases", "refused": False}
    row |= {"messages": '[{"role": "user", "content": "How?"}]', "verdict": "complied"}
    said = [("So.", "hm"), ("", "hm hm"), ("Like this.", "")]
    answers = pd.DataFrame(
        [
            row | {"sample": number, "answer": answer, "thought": thought}
            for number, (answer, thought) in enumerate(said)
        ]
    )
    file = tmp_path / "after.eval"
    inspect_log.write_inspect_log(answers, file, model="m", when="after", metrics={}, about={})
    samples = read_eval_log(str(file)).samples
    assert [(sample.id, sample.epoch) for sample in samples] == [("a/natural", 1), ("a/natural", 2), ("a/natural", 3)]
    assert [sample.output.completion for sample in samples] == [answer for answer, _ in said]
    assert [sample.metadata["thought"] for sample in samples] == [thought for _, thought in said]
    assert samples[0].metadata["verdict"] == "complied"


def test_a_run_without_answers_is_refused(tmp_path):
    write_identified(Folder.open(str(tmp_path / "run")))
    with pytest.raises(InputError, match="holds no judged answers; run moe-ray evaluate first"):
        export.run(argparse.Namespace(run_dir=str(tmp_path / "run"), out=tmp_path / "logs"))
    assert not (tmp_path / "logs").exists()


def test_without_inspect_the_extra_is_named(tmp_path, monkeypatch):
    def missing(module, what):
        raise InputError(f"{what} needs {module}")

    monkeypatch.setattr(inspect_log, "require", missing)
    folder = Folder.open(str(tmp_path / "run"))
    write_identified(folder)
    write_repaired(folder)
    with pytest.raises(InputError, match="a log of inspect_ai needs inspect_ai"):
        export.run(argparse.Namespace(run_dir=str(tmp_path / "run"), out=tmp_path / "logs"))
