"""`moe-ray report` writes the page anew, and takes the settings of the page only."""

from __future__ import annotations

import pytest
from run_directory import write_identified

from moe_ray.cli.main import main
from moe_ray.config.report import ReportConfig
from moe_ray.run_directory import REPORT
from moe_ray.storage.folder import Folder


@pytest.mark.parametrize("form", ["{}", "run_dir={}"])
def test_the_report_is_written_with_the_settings_given_and_its_place_is_said(form, tmp_path, monkeypatch, capsys):
    write_identified(Folder.open(str(tmp_path / "run")))
    given = []
    monkeypatch.setattr("moe_ray.cli.report.write_report", lambda run, config: given.append((run.folder.path, config)))
    assert main(["report", form.format(tmp_path / "run"), "report.examples=3"]) == 0
    assert given == [(str(tmp_path / "run"), ReportConfig(examples=3))]
    assert capsys.readouterr().out == f"file://{tmp_path}/run/{REPORT}\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{}/none"], "is not a run directory"),
        (["run_dir={}/none"], "is not a run directory"),
        (["{}"], "is not a run directory"),
        (["{}", "finetune.epochs=2"], "finetune.epochs: a report takes report.* only"),
        (["{}", "report.example=2"], "did you mean report.examples"),
    ],
)
def test_bad_input_gets_one_line(arguments, said, tmp_path, capsys):
    assert main(["report", *(argument.format(tmp_path) for argument in arguments)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert said in line
    assert not (tmp_path / "none").exists()
