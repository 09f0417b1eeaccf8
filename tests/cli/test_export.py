"""Judged answers as a log of inspect_ai: its own reader opens it and finds what was judged."""

from __future__ import annotations

import argparse

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
