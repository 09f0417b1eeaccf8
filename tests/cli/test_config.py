"""`moe-ray config`: a schema for editors, and a commented file to begin with."""

import json

import pytest

from moe_ray.cli.main import main
from moe_ray.config.io import describe_keys, load_config


def test_the_schema_is_json_that_knows_every_section(capsys):
    assert main(["config", "schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert set(schema["properties"]) >= {key.partition(".")[0] for key, *_ in describe_keys()}


def test_the_commented_file_is_printed_and_means_the_defaults(tmp_path, capsys):
    assert main(["config", "init"]) == 0
    text = capsys.readouterr().out
    (tmp_path / "run.yaml").write_text(text)
    assert load_config(str(tmp_path / "run.yaml")) == load_config()
    assert "#" in text


def test_the_commented_file_is_written_where_it_is_wanted(tmp_path, capsys):
    assert main(["config", "init"]) == 0
    text = capsys.readouterr().out
    assert main(["config", "init", str(tmp_path / "run.yaml")]) == 0
    assert (tmp_path / "run.yaml").read_text() == text
    assert capsys.readouterr().out == f"wrote {tmp_path}/run.yaml\n"


@pytest.mark.parametrize(
    ("name", "said"), [("mine.yaml", "already exists"), ("none/run.yaml", "cannot be written: No such file")]
)
def test_no_file_is_overwritten_and_no_folder_made(name, said, tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text("seed: 1\n")
    assert main(["config", "init", str(tmp_path / name)]) == 2
    assert said in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]
    assert (tmp_path / "mine.yaml").read_text() == "seed: 1\n"
